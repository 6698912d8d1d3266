"""The functional surface: one function an operator."""

from .ops.embedding_bag.drop_in import embedding_bag
from .ops.int8_matmul.op import int8_linear
from .ops.sparse_linear.op import sparse_linear

__all__ = ["embedding_bag", "int8_linear", "sparse_linear"]
