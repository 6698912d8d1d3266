"""``int8_linear`` on Triton kernels, for NVIDIA and AMD GPUs.

A layer is two launches: rows are quantized once, then multiplied tile by tile (weight_only: one launch). Nothing waits
for the GPU, so that calls can be captured in a CUDA graph; a static scale or zero point that is not valid gives NaN.

Tiles are chosen by the shape (``default_tile``). ``tune`` times a small set of them for a shape and a layer, and from
then on calls of that kind take the fastest: call it once for each batch size that matters, before graphs are captured.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from .. import triton as linear_triton
from ..activation import DYNAMIC, STATIC, WEIGHT_ONLY
from . import reference
from . import triton_kernels as kernels
from .spec import Int8Layer

# Within a tile, which is up to 128 rows, places are counted in 32 bits.
_MOST_COLUMNS = 1 << 24


class Tile(NamedTuple):
    """Rows, columns and depth that a program takes at once, and how it is compiled."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


# Products of bytes. A program of few rows only streams weights, and what counts is that enough of them are on their
# way: four stages of 8 KiB, and narrow tiles where wide ones would leave multiprocessors idle. Many rows: 128 x 128
# sums spill registers beside the sums of the weights.
_BYTE_TILES = (
    Tile(16, 32, 128, 4, 4),
    Tile(16, 64, 128, 4, 4),
    Tile(32, 64, 128, 4, 4),
    Tile(64, 64, 128, 4, 3),
    Tile(128, 64, 64, 8, 4),
)
# Products of floats, with weights converted in registers.
_FLOAT_TILES = (
    Tile(16, 32, 64, 4, 4),
    Tile(16, 64, 64, 4, 4),
    Tile(32, 64, 64, 4, 3),
    Tile(64, 64, 32, 4, 3),
    Tile(64, 128, 32, 8, 3),
)
# float32 is multiplied without tensor cores, which would round it: smaller tiles.
_FLOAT32_TILES = (Tile(16, 32, 64, 4, 2), Tile(32, 64, 32, 4, 2), Tile(64, 64, 32, 8, 2))
_MULTIPROCESSORS = 128
_FEWEST_ROWS = 16

_tuned: dict[tuple[object, ...], Tile] = {}
_TRITON_TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


# ---- tiles -------------------------------------------------------------------------------------------------------


def _fitted(tile: Tile, scheme: int, group: int) -> Tile:
    """The same with a depth that goes with groups, and on AMD with two stages, which is what it pipelines."""
    if group:
        tile = tile._replace(depth=min(tile.depth, group) if scheme == WEIGHT_ONLY else group)
    return tile._replace(stages=min(tile.stages, 2)) if torch.version.hip is not None else tile


def tiles(scheme: int, group: int, dtype: torch.dtype) -> list[Tile]:
    """The tiles that :func:`tune` chooses from, those for few rows first; ``dtype`` is that of the input."""
    few: tuple[Tile, ...] = _BYTE_TILES
    if scheme == WEIGHT_ONLY:
        few = _FLOAT32_TILES if dtype == torch.float32 else _FLOAT_TILES
    return list(dict.fromkeys(_fitted(tile, scheme, group) for tile in few))


def default_tile(rows: int, columns: int, scheme: int, group: int, dtype: torch.dtype) -> Tile:
    """The largest tile of which the result fills a GPU, of those with the fewest rows or that are half full."""
    usable = tiles(scheme, group, dtype)
    for tile in reversed(usable):
        programs = triton.cdiv(rows, tile.rows) * triton.cdiv(columns, tile.columns)
        if tile.rows < max(_FEWEST_ROWS + 1, 2 * rows) and programs >= _MULTIPROCESSORS:
            return tile
    return usable[0]


def _kind(rows: int, weight: torch.Tensor, scheme: int, group: int, dtype: torch.dtype) -> tuple[object, ...]:
    """Calls that share a tuned tile: of one layer's shape, with about as many rows."""
    size = dtype if scheme == WEIGHT_ONLY else None
    return triton.next_power_of_2(rows), *weight.shape, scheme == WEIGHT_ONLY, group, size, weight.device


def _tile(rows: int, weight: torch.Tensor, scheme: int, group: int, dtype: torch.dtype) -> Tile:
    found = _tuned.get(_kind(rows, weight, scheme, group, dtype)) if _tuned else None
    return found or default_tile(rows, weight.shape[0], scheme, group, dtype)


def tune(
    input: torch.Tensor,
    layer: Int8Layer,
    dtype: torch.dtype,
    measure: Callable[[Callable[[], Any]], float] | None = None,
) -> Tile:
    """Times a call with each of a small set of tiles, and lets later calls of its kind take the fastest.

    Args:
        input, layer, dtype: as for the operator. Calls of the same kind have weights of the same shape, and as many
            rows up to the next power of two.
        measure: gives the time of a call; default: ``triton.testing.do_bench``.
    """
    measure = measure or triton.testing.do_bench
    weight, _, group, _, _, scheme, _ = layer
    rows = input.numel() // weight.shape[1]
    kind = _kind(rows, weight, scheme, group, input.dtype)
    before, times = _tuned.get(kind), {}
    for tile in tiles(scheme, group, input.dtype):
        _tuned[kind] = tile
        try:
            times[tile] = measure(lambda: int8_linear(input, layer, dtype))
        except triton.runtime.errors.OutOfResources:  # more shared memory than this GPU has
            continue
        finally:
            del _tuned[kind]
            if before is not None:
                _tuned[kind] = before
    best = min(times, key=lambda tile: times[tile])
    _tuned[kind] = best
    return best


# ---- the operator ------------------------------------------------------------------------------------------------


def _check(good: bool, message: str) -> None:
    if not good:
        raise RuntimeError(message)


def _check_arguments(input: torch.Tensor, layer: Int8Layer, dtype: torch.dtype) -> None:
    """The reference's checks but for the values of input_qparams, which are on the GPU: the kernel looks at them."""
    reference.check_floats(input, dtype)
    weight, scheme = layer.weight, layer.scheme
    linear_triton.check_qparams_on_gpu(layer.input_qparams, scheme, weight.device)
    reference.checked_layer(layer._replace(input_qparams=None, scheme=DYNAMIC if scheme == STATIC else scheme))
    reference.check_input(input, weight)
    _check(weight.shape[0] < _MOST_COLUMNS, f"weight must have fewer than {_MOST_COLUMNS} rows on a GPU")


def _near_columns(matrix: torch.Tensor) -> torch.Tensor:
    """The matrix, copied if its rows are not contiguous, or so far apart that a tile of them is 2^31 elements long."""
    near = matrix.stride(0) < _MOST_COLUMNS and (matrix.stride(1) == 1 or matrix.shape[1] == 1)
    return matrix if near else matrix.contiguous()


def int8_linear(input: torch.Tensor, layer: Int8Layer, dtype: torch.dtype) -> torch.Tensor:
    """One layer over [..., K]: quantization of the input, integer product, scales, bias, activation."""
    _check_arguments(input, layer, dtype)
    weight, weight_scale, group, bias, input_qparams, scheme, activation = layer
    columns, width = weight.shape
    out = input.new_empty(*input.shape[:-1], columns, dtype=dtype)
    if out.numel() == 0:
        return out
    group = group if group < width else 0
    x = _near_columns(input.reshape(-1, width))
    weight = _near_columns(weight)
    tile = _tile(x.shape[0], weight, scheme, group, x.dtype)
    arguments = (
        weight_scale if bias is None else bias.contiguous(), x.shape[0], columns, width, x.stride(0), weight.stride(0),
        weight_scale.stride(0), weight_scale.stride(1),
    )  # fmt: skip
    options = {
        "GROUP": group, "ACTIVATION": activation, "HAS_BIAS": bias is not None, "BLOCK_M": tile.rows,
        "BLOCK_N": tile.columns, "BLOCK_K": tile.depth, "num_warps": tile.warps, "num_stages": tile.stages,
    }  # fmt: skip
    grid = (triton.cdiv(x.shape[0], tile.rows) * triton.cdiv(columns, tile.columns),)
    if scheme == WEIGHT_ONLY:
        # The interpreter multiplies the bits of bfloat16.
        kind = torch.float32 if triton.knobs.runtime.interpret else x.dtype
        linear_triton.launch(
            kernels.weight_only_kernel, grid, x.device, out, x, weight, weight_scale, *arguments,
            FLOAT=_TRITON_TYPES[kind], **options,
        )  # fmt: skip
        return out
    q, scale, zero = linear_triton.quantized(x, None if input_qparams is None else input_qparams.contiguous())
    arguments = (*arguments[:4], q.stride(0), *arguments[5:])
    linear_triton.launch(
        kernels.int8_kernel, grid, x.device, out, q, scale, zero, weight, weight_scale, *arguments,
        enable_fp_fusion=False, **options,
    )  # fmt: skip
    return out
