"""What each compiled CUDA kernel may take: the one table that test_cuda_code.py holds them against."""

from __future__ import annotations

from cuda_code import Budget

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "sm_120")

BUDGETS: dict[str, Budget] = {}
