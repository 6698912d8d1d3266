"""The functional surface: one function an operator."""

from .ops.embedding_bag.drop_in import embedding_bag
from .ops.int8_matmul.op import int8_linear

__all__ = ["embedding_bag", "int8_linear"]
