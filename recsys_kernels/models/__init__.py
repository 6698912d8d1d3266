"""Ranking models built on the library's modules, and their files.

Model files need safetensors, training (`recsys_kernels.models.train`) also scikit-learn: the extra `demo`.
"""

from .dlrm import DLRM, DLRMConfig, Table
from .files import ModelFileError, RankingModel, load_model, save_model
from .plain import PlainDLRM

__all__ = [
    "DLRM",
    "DLRMConfig",
    "ModelFileError",
    "PlainDLRM",
    "RankingModel",
    "Table",
    "load_model",
    "save_model",
]
