"""A few calls of every operator, for compute-sanitizer, which slows down what it watches; results are checked, too."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

# Every tensor gets memory of its own: in torch's pool, reading past its end would be reading another's.
os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"

import torch

TESTS = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(TESTS.parent), str(TESTS / "triton_interpreter")]

import test_bad_input  # noqa: E402
import test_int8_kernels  # noqa: E402
import test_kernels  # noqa: E402
import test_sparse_kernels  # noqa: E402
from on_device import OnDevice, moved  # noqa: E402
from sparse_gpu_cases import WRONG_STRUCTURES, layer  # noqa: E402

import recsys_kernels as rk  # noqa: E402
from recsys_kernels.backends import selection  # noqa: E402
from recsys_kernels.backends.registry import BOUNDS_CHECKS  # noqa: E402
from recsys_kernels.ops.embedding_bag.reference import MAX  # noqa: E402
from recsys_kernels.ops.linear.activation import (  # noqa: E402
    DYNAMIC,
    WEIGHT_ONLY,
)
from recsys_kernels.testing import FLOAT_DTYPES, SPARSE_PATTERNS, collection_samples  # noqa: E402

KINDS = (
    "width-7",
    "width-16",
    "width-33",
    "last-offset-before-end",
    "strided-table",
    "matrix-",
    "padding-6",
    "same-index",
)


def right_input(device: torch.device, lookups_only: bool) -> int:
    """Calls with right input; returns how many groups of them gave the right results."""
    done = 0
    test_kernels.TRITON = OnDevice(device)  # type: ignore[assignment]
    for dtype in FLOAT_DTYPES:
        for sample in test_kernels.SAMPLES[dtype]:
            if not sample.name.startswith(KINDS):
                continue
            test_kernels.test_forward(sample)
            done += 1
            if dtype == torch.float32:
                for bits in (8, 4):
                    test_kernels.test_quantized(sample, bits)
            if sample.mode == MAX:
                test_kernels.test_max(sample)
            elif not lookups_only:
                test_kernels.test_backward(sample)
                if sample.per_sample_weights is not None:
                    test_kernels.test_weights_backward(sample)
        for collection in collection_samples(dtype):
            test_kernels.test_collection(collection)
            done += 1
    test_kernels.test_collection_of_every_type()
    test_int8_kernels.TRITON = OnDevice(device)  # type: ignore[assignment]
    for one in test_int8_kernels.SAMPLES[::3]:
        if one.input.is_contiguous() and one.weight.is_contiguous():  # others are copied by torch's kernels
            test_int8_kernels.test_forward(one)
            done += 1
    if not lookups_only:
        done += sparse_layers(device)
    return done


def sparse_layers(device: torch.device) -> int:
    """Every pattern with few and many rows of input; returns how many calls gave the right results."""
    test_sparse_kernels.TRITON = OnDevice(device)  # type: ignore[assignment]
    for pattern in SPARSE_PATTERNS:
        for rows in (3, 20):
            for scheme in (None, DYNAMIC, WEIGHT_ONLY):
                test_sparse_kernels.test_forward(layer(rows, 41, 21, pattern, scheme))
            test_sparse_kernels.test_forward(layer(rows, 41, 21, pattern, DYNAMIC, 32))
    for case in test_sparse_kernels.GRADIENTS:
        test_sparse_kernels.test_weight_gradient(case)
    return 8 * len(SPARSE_PATTERNS) + len(test_sparse_kernels.GRADIENTS)


def wrong_input(device: torch.device, lookups_only: bool, modes: tuple[str, ...]) -> int:
    """Calls with wrong indices and offsets in each mode; returns how many."""
    done = 0
    indices = torch.tensor([0, 6, 2, 3, 1, 1 << 40, -5, 4])
    calls = test_bad_input.calls(indices, torch.tensor([0, 2, 5, 9, 8]))
    for mode in modes:
        for name, args in calls.items():
            if lookups_only and "backward" in name:
                continue
            with rk.bounds_check(mode):
                selection.implementation(name, torch.empty(0, device=device))(*moved(args, device))
                done += 1
            try:
                rk.check_bounds(device)
            except (IndexError, RuntimeError):
                assert mode == "raise"
            else:
                assert mode != "raise", f"{name} found nothing wrong"
    if modes and not lookups_only:
        # Nobody looks for what is wrong in these, and nothing outside of them is read.
        values, rest = torch.ones(6), (3, 8, None, None, None, WEIGHT_ONLY, 0, torch.float32)
        for crow, col in WRONG_STRUCTURES.values():
            for rows in (2, 20):
                OnDevice(device).sparse_linear(torch.ones(rows, 8), values, crow, col, *rest)
                done += 1
    return done


def main() -> None:
    """Runs the set on a GPU."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--lookups-only", action="store_true", help="no gradients, for which torch's kernels sort")
    options = parser.parse_args()
    torch.set_num_threads(1)
    device = torch.device("cuda")
    with rk.backend("cuda"):
        right = right_input(device, options.lookups_only)
        wrong = wrong_input(device, options.lookups_only, BOUNDS_CHECKS)
    print(f"{right} groups of calls are right, {wrong} with wrong input ended well")


if __name__ == "__main__":
    main()
