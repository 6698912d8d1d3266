"""Which implementation of an operator runs: registry, selection, environment, diagnosis."""
