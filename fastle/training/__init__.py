"""Training: the trainer and its step in three modes, the loop, the run directory, evaluation and display."""
