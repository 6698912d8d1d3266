"""Linear layers whose weights are pruned: only what is kept is stored, read and multiplied."""
