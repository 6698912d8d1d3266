"""The kinds of layers that get smaller: one file a kind, and each import lists a kind."""

from . import embedding_tables as embedding_tables
from . import int8_linear as int8_linear
from . import sparse_linear as sparse_linear
