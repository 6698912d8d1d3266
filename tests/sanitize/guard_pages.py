"""Runs every kernel at every level with inputs that end (or begin) at memory that must not be touched.

A program of its own: reading a byte too many ends it with SIGSEGV. With the argument ``wrong`` it reads one row too
many, to show that it would. Prints the number of calls.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from typing import Any

import torch

from recsys_kernels.backends.registry import ISA_LEVELS, native
from recsys_kernels.testing import FLOAT_DTYPES, WIDTHS, assert_matches

PAGE = mmap.PAGESIZE
ops = torch.ops.recsys_kernels
_libc = ctypes.CDLL(None, use_errno=True)
_mapped: list[mmap.mmap] = []
calls = 0


def guarded(tensor: torch.Tensor, at_end: bool = True, hidden: int = 0) -> torch.Tensor:
    """A copy whose last byte is the last before (or its first byte the first after) a page that must not be touched.

    ``hidden`` more bytes, of that page, are part of the tensor's first dimension.
    """
    tensor = tensor.contiguous()
    size = tensor.nbytes
    inner = -(-max(size, 1) // PAGE) * PAGE
    memory = mmap.mmap(-1, inner + 2 * PAGE)
    _mapped.append(memory)
    base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    begin = base + PAGE + (inner - size if at_end else 0)
    ctypes.memmove(begin, tensor.data_ptr(), size)
    for page in (base, base + PAGE + inner):
        if _libc.mprotect(ctypes.c_void_p(page), ctypes.c_size_t(PAGE), 0):
            raise OSError(ctypes.get_errno(), "mprotect")
    if size + hidden == 0:
        return tensor
    raw = (ctypes.c_uint8 * (size + hidden)).from_address(begin)
    flat = torch.frombuffer(raw, dtype=torch.uint8).view(tensor.dtype)
    return flat.reshape(-1, *tensor.shape[1:])


def same(got: Any, wanted: Any) -> None:
    global calls
    calls += 1
    for one, two in zip(got, wanted, strict=True) if isinstance(got, tuple) else ((got, wanted),):
        assert torch.equal(one, two)


def float_kernels(weight: torch.Tensor, at_end: bool) -> None:
    """Every operator over a float table, with all inputs guarded."""
    rows, dim = weight.shape
    indices, offsets = torch.tensor([rows - 1, 0, 2, rows - 1, 1, 1, rows - 1]), torch.tensor([0, 3, 3, 5])
    factors, grad = torch.randn(7).to(weight.dtype), torch.randn(4, dim).to(weight.dtype)
    matrix = indices[:6].reshape(3, 2)
    table, upstream, weights = (guarded(t, at_end) for t in (weight, grad, factors))
    for index_type in (torch.int32, torch.int64):
        ids, starts = guarded(indices.to(index_type), at_end), guarded(offsets.to(index_type), at_end)
        for mode in (0, 1, 2):
            same(
                ops.embedding_bag(table, ids, starts, None, mode, -1, False),
                ops.embedding_bag(weight, indices, offsets, None, mode, -1, False),
            )
        for mode in (0, 1):
            bags, plain = (ids, starts, weights, mode, 1, False), (indices, offsets, factors, mode, 1, False)
            same(ops.embedding_bag(table, *bags), ops.embedding_bag(weight, *plain))
            same(ops.embedding_bag_backward(upstream, *bags, rows), ops.embedding_bag_backward(grad, *plain, rows))
            same(
                ops.embedding_bag_weights_backward(upstream, table, ids, starts, *bags[3:]),
                ops.embedding_bag_weights_backward(grad, weight, indices, offsets, *plain[3:]),
            )
        same(
            ops.embedding_bag_max(table, ids, starts, -1, False, True),
            ops.embedding_bag_max(weight, indices, offsets, -1, False, True),
        )
        same(
            ops.embedding_bag(table, guarded(matrix.to(index_type), at_end), None, None, 0, -1, False),
            ops.embedding_bag(weight, matrix, None, None, 0, -1, False),
        )


def quantized_kernels(weight: torch.Tensor, bits: int, at_end: bool) -> None:
    """Quantization into guarded memory, into memory with gaps that must stay as they are, and lookups in both."""
    rows, dim = weight.shape
    columns = dim if bits == 8 else (dim + 1) // 2
    q = guarded(torch.zeros(rows, columns, dtype=torch.uint8), at_end)
    scale_bias = guarded(torch.zeros(rows, 2, dtype=torch.float16), at_end)
    ops.quantize_rowwise(guarded(weight, at_end), bits, -11, q, scale_bias)
    # As in tables too large for the cache: scale and bias behind each row, on an even address.
    behind = columns + columns % 2
    buffer = guarded(torch.full((rows, behind + 4), 0xAB, dtype=torch.uint8), at_end)
    inner, inner_scale_bias = buffer[:, :columns], buffer[:, behind:].view(torch.float16)
    ops.quantize_rowwise(weight, bits, -11, inner, inner_scale_bias)
    wide, wide_scale_bias = torch.full((rows, columns + 5), 0xAB, dtype=torch.uint8), torch.full((rows, 5), 7.0).half()
    ops.quantize_rowwise(weight, bits, -11, wide[:, 3 : columns + 3], wide_scale_bias[:, 2:4])
    same((inner, inner_scale_bias), (q, scale_bias))
    same((wide[:, 3 : columns + 3], wide_scale_bias[:, 2:4]), (q, scale_bias))
    assert (buffer[:, columns:behind] == 0xAB).all()
    assert (wide[:, :3] == 0xAB).all()
    assert (wide[:, columns + 3 :] == 0xAB).all()
    assert (wide_scale_bias[:, [0, 1, 4]] == 7.0).all()
    indices, offsets = torch.tensor([rows - 1, 0, 2, rows - 1, 1, rows - 1]), torch.tensor([0, 3, 3])
    for mode in (0, 1, 2):
        bags = (guarded(indices, at_end), guarded(offsets, at_end), None, mode, -1, False, torch.float32)
        plain = ops.quantized_embedding_bag(
            q.clone(), scale_bias.clone(), -11, dim, bits, indices, offsets, None, mode, -1, False, torch.float32
        )
        for table in ((q, scale_bias), (inner, inner_scale_bias)):
            same(ops.quantized_embedding_bag(*table, -11, dim, bits, *bags), plain)
    rounded = ops.quantized_embedding_bag(
        q, scale_bias, -11, dim, bits, torch.arange(rows).reshape(-1, 1), None, None, 0, -1, False, torch.float32
    )
    step = scale_bias[:, :1].float() * 2.0**-11
    assert ((rounded - weight.float()).abs() <= step * 0.51 + 1e-6).all()


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if "wrong" in sys.argv:
        weight = torch.randn(4, 32)
        table = guarded(weight, hidden=weight[0].nbytes)
        assert table.shape == (5, 32)
        good = ops.embedding_bag(table, torch.tensor([[3]]), None, None, 0, -1, False)
        assert_matches(good, weight[3:4])
        print("now one row too many", flush=True)
        ops.embedding_bag(table, torch.tensor([[4]]), None, None, 0, -1, False)
        return
    for level in ISA_LEVELS[: ISA_LEVELS.index(str(native.isa_supported())) + 1]:
        native.select_isa(level)
        for at_end in (True, False):
            for dim in WIDTHS:
                print(f"{level}, {dim} columns, {'end' if at_end else 'start'}", file=sys.stderr, flush=True)
                for dtype in FLOAT_DTYPES:
                    weight = torch.randn(5, dim).to(dtype)
                    float_kernels(weight, at_end)
                    for bits in (8, 4):
                        quantized_kernels(weight, bits, at_end)
                _mapped.clear()
    print(calls)


if __name__ == "__main__":
    main()
