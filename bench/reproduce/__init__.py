"""The table of every row of the method: what `scripts/reproduce.py` trains, measures and draws."""
