"""The loop around the method: the step in its three modes, runs on disk, evaluation, display."""
