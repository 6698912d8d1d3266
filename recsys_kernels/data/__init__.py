"""Data sets for ranking models: MovieLens in its published layouts, and Criteo click logs.

The readers (`recsys_kernels.data.load`) need the extra `demo`; a served model needs none of its packages.
"""

from .errors import DataError
from .examples import Batch, Dataset, Schema, Vocabulary

__all__ = ["Batch", "DataError", "Dataset", "Schema", "Vocabulary"]
