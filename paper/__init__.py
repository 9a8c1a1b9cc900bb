"""Every table and figure of the paper: numbers, runs, tables, figures, costs."""
