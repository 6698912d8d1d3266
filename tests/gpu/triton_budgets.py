"""What each compiled Triton kernel of a case may take: the one table that test_triton_aot.py holds them against."""

from __future__ import annotations

from typing import NamedTuple

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")


class Budget(NamedTuple):
    """Most registers a thread on each of TARGETS, most bytes of shared memory, fewest wide loads (NVIDIA, AMD).

    Attributes:
        products: what the kernel must multiply matrices with, "products of bytes" or "products of floats"; or nothing.
        wide_copies: fewest copies of 16 bytes to shared memory that pass by the registers (NVIDIA).
    """

    registers: tuple[int, int, int, int]
    shared: int
    wide_loads: tuple[int, int]
    products: str = ""
    wide_copies: int = 0


# Registers count in steps: with 64 a multiprocessor runs 32 one-warp programs (all that it takes of them), with 72 it
# runs 28, with 80 25, with 96 21; a SIMD of gfx942 runs 8 waves with 64. Figures are the larger ones of Triton 3.6.0
# and 3.8.0, rounded up to 8. Local memory is never allowed: a spill costs more traffic than the rows. Shared memory
# only changes layouts of a bag's rows and sums.
#
# Wide loads are the 16-byte loads of rows into registers of their own, which is what a program has in flight: four for
# a tile (int8: two, int4: one; half of it on AMD, whose waves have 64 lanes). Where there are fewer, ptxas found the
# next load's registers busy. Rows that no 16 bytes divide have none.
BUDGETS: dict[str, dict[str, Budget]] = {
    "fp32 64": {
        "bag_kernel": Budget((64, 64, 64, 40), 256, (4, 2)),
    },
    "fp32 128": {
        "bag_kernel": Budget((64, 64, 64, 40), 0, (4, 2)),
    },
    "fp32 33": {
        "bag_kernel": Budget((64, 64, 64, 40), 0, (0, 0)),
    },
    "fp32 64 mean of weighted int32 with padding": {
        "bag_kernel": Budget((64, 64, 64, 40), 256, (3, 2)),
    },
    "fp32 64 max": {
        "bag_kernel": Budget((64, 64, 64, 40), 256, (4, 2)),
    },
    "fp16 64": {
        "bag_kernel": Budget((80, 80, 88, 48), 128, (4, 2)),
    },
    "fp16 128 weighted": {
        "bag_kernel": Budget((88, 88, 96, 56), 256, (4, 2)),
    },
    "bf16 128": {
        "bag_kernel": Budget((80, 80, 88, 56), 256, (4, 2)),
    },
    "fp64 64": {
        "bag_kernel": Budget((64, 64, 64, 40), 0, (4, 2)),
    },
    "int8 64": {
        "bag_kernel": Budget((96, 80, 88, 56), 256, (2, 1)),
    },
    "int4 128": {
        "bag_kernel": Budget((96, 96, 96, 56), 512, (1, 0)),
    },
    "argmax fp32 64": {
        "argmax_kernel": Budget((80, 64, 72, 56), 256, (1, 2)),
    },
    "backward fp32 64": {
        "keys_kernel": Budget((64, 64, 64, 24), 0, (0, 0)),
        "segments_kernel": Budget((64, 64, 64, 32), 256, (4, 2)),
    },
    "backward fp32 128 sum": {
        "keys_kernel": Budget((48, 48, 48, 24), 0, (0, 0)),
        "segments_kernel": Budget((56, 64, 64, 32), 0, (4, 2)),
    },
    "backward bf16 64": {
        "keys_kernel": Budget((64, 64, 64, 24), 0, (0, 0)),
        "segments_kernel": Budget((80, 80, 80, 56), 256, (4, 2)),
    },
    "weights backward fp32 64": {
        "weights_grad_kernel": Budget((72, 64, 64, 56), 256, (4, 2)),
    },
    "collection fp32 64": {
        "collection_kernel": Budget((72, 72, 72, 56), 256, (4, 4)),
    },
    "collection fp32 16, 50, 128": {
        "collection_kernel": Budget((80, 72, 80, 56), 512, (4, 6)),
    },
    "collection fp16 64": {
        "collection_kernel": Budget((72, 72, 72, 64), 256, (2, 3)),
    },
    "collection fp64 64": {
        "collection_kernel": Budget((72, 72, 72, 64), 0, (4, 4)),
    },
    "collection int8 or int4 64": {
        "collection_kernel": Budget((80, 80, 80, 64), 512, (1, 3)),
    },
    "collection fp32 64, bf16 128, int8 or int4 64": {
        "collection_kernel": Budget((96, 80, 80, 64), 512, (4, 6)),
    },
    "fp32 64 clamped": {
        "bag_kernel": Budget((64, 64, 64, 40), 256, (4, 2)),
    },
    "int8 64 ignored": {
        "bag_kernel": Budget((96, 80, 88, 56), 256, (2, 1)),
    },
    "backward fp32 64 clamped": {
        "keys_kernel": Budget((64, 64, 64, 24), 0, (0, 0)),
        "segments_kernel": Budget((64, 64, 64, 32), 256, (4, 2)),
    },
    "collection fp32 64 ignored": {
        "collection_kernel": Budget((80, 72, 72, 64), 256, (4, 4)),
    },
    # int8_linear, by Triton 3.8.0. A tile's operands are in shared memory several times over, copied while the one
    # before is multiplied: 100 KiB of it are what the smallest of the GPUs has for a program. Rows to quantize are
    # short here, so that a thread has few loads of them. On sm_90 and sm_100 the tensor cores read shared memory, but
    # the sums of the weights are taken from registers, which is where many of these go.
    "layer of 1 x 512 x 512": {
        "quantize_kernel": Budget((32, 40, 32, 16), 16, (1, 0)),
        "int8_kernel": Budget((56, 56, 56, 64), 18432, (0, 4), "products of bytes", 12),
    },
    "layer of 512 x 1024 x 1024": {
        "quantize_kernel": Budget((40, 40, 40, 24), 16, (1, 2)),
        "int8_kernel": Budget((128, 168, 168, 128), 40960, (0, 8), "products of bytes", 24),
    },
    "layer of 512 x 1024 x 4096, groups of 128": {
        "quantize_kernel": Budget((40, 40, 40, 24), 16, (1, 2)),
        "int8_kernel": Budget((176, 176, 200, 240), 90368, (0, 8), "products of bytes", 24),
    },
    "weights only, 16 x 1024 x 4096, fp16": {
        "weight_only_kernel": Budget((56, 56, 56, 72), 12288, (0, 0), "products of floats", 4),
    },
    "weights only, 512 x 1024 x 4096, bf16": {
        "weight_only_kernel": Budget((136, 168, 256, 128), 28672, (0, 0), "products of floats", 4),
    },
    # sparse_linear, by Triton 3.8.0. Wide loads are of rows of transposed input, two or four columns at a time for each
    # thread; kernels for few rows gather single numbers and have none. What is in shared memory are columns and values
    # on their way to the threads that need them, and tiles for tensor cores, which blocks of 16 rows and int8 2:4 have.
    "sparse, 1 row, fp32": {
        "entries_kernel": Budget((40, 40, 40, 16), 0, (0, 0)),
    },
    "sparse, 1 row, dynamic blocks of 4 x 1": {
        "quantize_kernel": Budget((40, 40, 40, 24), 16, (2, 2)),
        "entries_kernel": Budget((64, 64, 64, 40), 16, (0, 0)),
    },
    "sparse, 8 rows, fp16 2:4": {
        "entries_kernel": Budget((104, 104, 104, 72), 2048, (0, 0)),
    },
    "sparse, 512 rows, fp32": {
        "entries_kernel": Budget((96, 80, 80, 48), 512, (4, 4)),
    },
    "sparse, 512 rows, bf16": {
        "entries_kernel": Budget((72, 64, 72, 48), 512, (4, 2)),
    },
    "sparse, 512 rows, dynamic": {
        "quantize_kernel": Budget((40, 40, 40, 24), 16, (2, 2)),
        "entries_kernel": Budget((64, 64, 64, 64), 512, (2, 1)),
    },
    "sparse, 512 rows, blocks of 4 x 1": {
        "entries_kernel": Budget((80, 72, 72, 56), 1024, (2, 1)),
    },
    "sparse, 512 rows, blocks of 16 x 1": {
        "entries_kernel": Budget((88, 80, 80, 40), 4096, (0, 0)),
    },
    "sparse, 512 rows, blocks of 16 x 4, bf16": {
        "entries_kernel": Budget((72, 72, 80, 56), 9344, (0, 6), "products of floats", 8),
    },
    "sparse, 512 rows, dynamic blocks of 16 x 4": {
        "quantize_kernel": Budget((40, 40, 40, 24), 16, (2, 2)),
        "entries_kernel": Budget((96, 96, 96, 72), 9472, (0, 6), "products of bytes"),
    },
    "sparse, 512 rows, dynamic 2:4": {
        "quantize_kernel": Budget((40, 40, 40, 24), 16, (2, 2)),
        "two_of_four_kernel": Budget((168, 128, 160, 120), 18944, (0, 2), "products of bytes", 6),
    },
    "sparse gradient, fp32": {
        "gradient_kernel": Budget((56, 64, 56, 40), 64, (4, 4)),
    },
    "sparse gradient, bf16 2:4": {
        "gradient_kernel": Budget((64, 64, 64, 40), 8192, (5, 3)),
    },
    "sparse gradient, blocks of 4 x 4": {
        "block_gradient_kernel": Budget((72, 72, 72, 40), 2048, (4, 2)),
    },
}
