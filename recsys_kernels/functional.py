"""The functional surface: one function an operator."""

from .ops.embedding_bag.drop_in import embedding_bag
from .ops.linear.int8.autograd import int8_linear
from .ops.linear.sparse.autograd import sparse_linear

__all__ = ["embedding_bag", "int8_linear", "sparse_linear"]
