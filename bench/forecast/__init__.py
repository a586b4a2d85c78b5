"""The training step as a GPU would run it, without a GPU: its code generated, counted, and its time computed."""
