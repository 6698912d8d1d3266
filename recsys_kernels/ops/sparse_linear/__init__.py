"""Linear layers whose weights are pruned: only what is kept is stored, read and multiplied.

The module is imported at its first use, ``recsys_kernels.SparseLinear``: who only looks rows up pays nothing for it.
"""
