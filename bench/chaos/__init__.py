"""Damage of every kind, done to runs: what `scripts/chaos.py` draws from."""
