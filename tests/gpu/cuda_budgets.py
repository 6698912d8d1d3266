"""What each compiled CUDA kernel may take: the one table that test_cuda_code.py holds them against."""

from __future__ import annotations

from cuda_code import Budget

ARCHITECTURES = ("sm_75", "sm_80", "sm_90", "sm_100", "sm_120")


def _everywhere(registers: int) -> dict[str, int]:
    return dict.fromkeys(ARCHITECTURES, registers)


# Registers count in steps: blocks are of 256 threads, of which a multiprocessor runs 8 at once with 32 registers a
# thread, 6 with 40, 5 with 48, 4 with 64, 3 with 80 and 2 with 128. Figures are those of nvcc 13.0, rounded up to the
# next step; sm_75 runs 4 blocks at most. Local memory is not allowed: a spill costs more traffic than the rows. But on
# sm_75 four numbers of what is done around the loops over bags find no place; the loops themselves touch none of it.
#
# Wide loads are the 16-byte loads of rows into registers of their own, which is what a lane has in flight: 8 rows of a
# bag, 4 gradients of a row. As many must be under way in the loop of each type: fp32, then fp16, bf16 and int8 with 4
# rows; 8-byte loads of 4 int4 rows. float64 tables, and rows that a maximum or a weight's gradient reads, are read in
# smaller pieces: there are few of them, and more code for them would only make the library larger.
BUDGETS: dict[str, Budget] = {
    "pool_kernel<float>": Budget(_everywhere(80), 0, 8, runs={128: (8, 4, 4, 4), 64: (4,)}, local={"sm_75": (16, 13)}),
    "pool_kernel<double>": Budget(_everywhere(64), 0, 0),
    "argmax_kernel<float>": Budget(_everywhere(48) | {"sm_75": 56}, 0, 0),
    "argmax_kernel<double>": Budget(_everywhere(48) | {"sm_75": 56}, 0, 0),
    "mean_kernel<float>": Budget(_everywhere(32) | {"sm_75": 40, "sm_120": 40}, 0, 0),
    "mean_kernel<double>": Budget(_everywhere(32) | {"sm_75": 40, "sm_120": 40}, 0, 0),
    "keys_kernel<float>": Budget(_everywhere(32), 0, 0),
    "keys_kernel<double>": Budget(_everywhere(32), 0, 0),
    "segments_kernel<float>": Budget(_everywhere(80), 0, 4, runs={128: (4, 4, 4)}),
    "segments_kernel<double>": Budget(_everywhere(80), 0, 0),
    "weights_kernel<float>": Budget(_everywhere(64), 0, 0),
    "weights_kernel<double>": Budget(_everywhere(64), 0, 0),
    # int8_linear. IMMA is the tensor cores' product of bytes, IDP the sum of four weights: both in the loop of 16-byte
    # loads and in the one for what is left. Shared memory is for results; from sm_90 on 1 KiB is the system's. Loads of
    # groups are of 8 bytes, and a product has 8 (few rows: 4) loads of operands in flight.
    "quantize_rows_kernel": Budget(_everywhere(32) | {"sm_75": 48, "sm_120": 40}, 1088, 1),
    "split_product_kernel": Budget(_everywhere(64), 10240, 4, needs={"IMMA": 8, "IDP": 16}),
    "tile_product_kernel": Budget(_everywhere(128), 34816, 8, needs={"IMMA": 32, "IDP": 32}),
    "group_product_kernel": Budget(_everywhere(128), 18432, 0, needs={"IMMA": 8, "IDP": 8}),
    "weight_only_kernel": Budget(_everywhere(128), 0, 3),
    # sparse_linear, for one row of weights and for four that share their columns: of floats (Product 0), of bytes of
    # one column (1) and of four (2). IDP is the product of four bytes: of what a lane reads at once, four units of one
    # row or two of four, each with four rows of the input, and the sum of the weights.
    "few_rows_kernel<1, (Product)0>": Budget(_everywhere(80), 2048, 0),
    "few_rows_kernel<1, (Product)1>": Budget(_everywhere(64), 2048, 0, needs={"IDP": 20}),
    "few_rows_kernel<1, (Product)2>": Budget(_everywhere(64), 2048, 0, needs={"IDP": 20}),
    "few_rows_kernel<4, (Product)0>": Budget(_everywhere(80), 5120, 2),
    "few_rows_kernel<4, (Product)1>": Budget(_everywhere(80), 5120, 0, needs={"IDP": 40}),
    "few_rows_kernel<4, (Product)2>": Budget(_everywhere(80), 5120, 0, needs={"IDP": 40}),
    # Of many rows a lane reads four at once, of as many columns as it has units.
    "many_rows_kernel<1, (Product)0>": Budget(_everywhere(64), 5632, 4),
    "many_rows_kernel<1, (Product)1>": Budget(_everywhere(64), 5632, 4, needs={"IDP": 20}),
    "many_rows_kernel<1, (Product)2>": Budget(_everywhere(64), 5632, 4, needs={"IDP": 20}),
    "many_rows_kernel<4, (Product)0>": Budget(_everywhere(80), 17920, 4),
    "many_rows_kernel<4, (Product)1>": Budget(_everywhere(80), 17920, 2, needs={"IDP": 40}),
    "many_rows_kernel<4, (Product)2>": Budget(_everywhere(80), 17920, 2, needs={"IDP": 40}),
    "transpose_kernel": Budget(_everywhere(32), 5248, 0),
    # Where groups of columns have scales of their own: weights, and quantized rows, to floats.
    "scale_values_kernel": Budget(_everywhere(32), 0, 0),
    "dequantize_rows_kernel": Budget(_everywhere(32), 0, 0),
    "weight_gradient_kernel<1>": Budget(_everywhere(48), 1024, 2),
    "weight_gradient_kernel<4>": Budget(_everywhere(64), 1024, 2),
}
