"""What the five benchmarks share: the command, the measurement of a case, tables and plots, peers."""
