"""Every table and figure of the paper, ours beside the paper's. `python -m paper --help`."""
