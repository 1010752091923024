"""Tasks, scorers, generation, statistics and the report."""
