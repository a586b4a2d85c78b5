"""The table of results: what `scripts/reproduce.py` trains, measures and writes."""
