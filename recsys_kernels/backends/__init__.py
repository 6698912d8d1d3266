"""Which operators there are, which implementation of each runs, and what this machine has."""
