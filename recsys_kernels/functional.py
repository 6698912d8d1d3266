"""The functional surface: one function an operator."""

from .ops.embedding_bag.drop_in import embedding_bag

__all__ = ["embedding_bag"]
