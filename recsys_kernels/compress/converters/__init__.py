"""How each kind of layer gets smaller."""
