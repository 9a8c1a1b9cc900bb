"""Ours beside the paper's: `python -m paper --help`."""
