"""``optimize``: a copy of a model with smaller layers."""
