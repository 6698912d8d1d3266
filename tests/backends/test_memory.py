"""Where tables lie: on huge pages, aligned, and unchanged by being moved there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import recsys_kernels as rk
from recsys_kernels import cli
from recsys_kernels.ops.embedding_bag import memory

MEBIBYTE = 1 << 20


def mappings(tensor: torch.Tensor) -> list[tuple[range, dict[str, str]]]:
    """Address range and fields, by the system's own account, of the mappings that hold a tensor."""
    begin = tensor.data_ptr()
    end = begin + tensor.nbytes
    every: list[tuple[range, dict[str, str]]] = []
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            every.append((range(int(found[1], 16), int(found[2], 16)), {}))
        else:
            name, _, value = line.partition(":")
            every[-1][1][name] = value
    return [(where, fields) for where, fields in every if where.start < end and begin < where.stop]


def huge_bytes(tensor: torch.Tensor) -> int:
    """Bytes on huge pages in the mappings that hold a tensor."""
    return sum(int(fields["AnonHugePages"].split()[0]) * 1024 for _, fields in mappings(tensor))


def advised_bytes(tensor: torch.Tensor) -> int:
    """Bytes of a tensor in mappings for which huge pages were asked."""
    begin, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
    asked = (where for where, fields in mappings(tensor) if "hg" in fields["VmFlags"].split())
    return sum(min(where.stop, end) - max(where.start, begin) for where in asked)


def system_grants_huge_pages() -> bool:
    return memory.huge_pages_state() in ("always", "madvise")


def test_state_is_that_of_the_system() -> None:
    state = memory.huge_pages_state()
    path = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    assert state == (re.search(r"\[(\w+)\]", path.read_text())[1] if path.exists() else "unsupported")  # type: ignore[index]


@pytest.mark.skipif(not system_grants_huge_pages(), reason="the system gives no huge pages")
def test_existing_tensor_is_moved_in_place() -> None:
    tensor = torch.zeros(24 * MEBIBYTE // 4)
    tensor.copy_(torch.arange(tensor.numel()) % 1000)
    before, address = tensor.clone(), tensor.data_ptr()
    moved = rk.use_huge_pages(tensor)
    assert torch.equal(tensor, before)
    assert tensor.data_ptr() == address
    # All whole huge pages of 24 MiB, or, where the system refuses, none: it must say which.
    assert moved == (huge_bytes(tensor) >= 20 * MEBIBYTE)


@pytest.mark.skipif(not system_grants_huge_pages(), reason="the system gives no huge pages")
def test_new_tables_ask_for_huge_pages() -> None:
    """How many the system gives depends on how fragmented its memory is: what is ours is to ask, on their borders."""
    made = {
        "EmbeddingBag": rk.EmbeddingBag(4 * MEBIBYTE // 16, 64).weight,
        "collection": rk.EmbeddingBagCollection([rk.EmbeddingBagConfig("a", MEBIBYTE // 4, 64)]).table("a"),
        "half": rk.EmbeddingBag(MEBIBYTE // 4, 64).half().weight,
        "quantized": rk.QuantizedEmbeddingBag.from_float(rk.EmbeddingBag(MEBIBYTE // 4, 64)).weight,
        "dequantized": rk.QuantizedEmbeddingBag.from_float(rk.EmbeddingBag(MEBIBYTE // 8, 64)).to_float().weight,
    }
    for name, weight in made.items():
        assert advised_bytes(weight) >= weight.nbytes - 2 * MEBIBYTE, name
    probe = torch.zeros(64 * MEBIBYTE // 4)
    if rk.use_huge_pages(probe):  # there are some to be had
        assert any(map(huge_bytes, made.values()))


def test_small_and_odd_tensors_are_left_alone() -> None:
    for tensor in (torch.zeros(10), torch.zeros(0), torch.zeros(MEBIBYTE // 4), torch.empty(5, device="meta")):
        assert rk.use_huge_pages(tensor) is False
    view = torch.arange(3 * MEBIBYTE, dtype=torch.int32)[::7][5:]
    before = view.clone()
    rk.use_huge_pages(view)
    assert torch.equal(view, before)


def test_systems_without_madvise_use_small_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Silently 4 KiB pages where the system refuses: no libc, or one that says no."""
    tensor = torch.zeros(8 * MEBIBYTE // 4)

    class Refuses:
        def madvise(self, *args: object) -> int:
            return -1

    for libc in (None, Refuses()):
        monkeypatch.setattr(memory, "_libc", lambda libc=libc: libc)
        assert rk.use_huge_pages(tensor) is False
        bag = rk.EmbeddingBag(MEBIBYTE // 8, 16)
        bag.half()
        quantized = rk.QuantizedEmbeddingBag.from_float(bag)
        assert quantized(torch.tensor([[0, 1]])).shape == (1, 16)


def test_kernel_without_collapse_is_not_on_huge_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Linux before 6.1 knows MADV_HUGEPAGE, which only counts for what is written later."""

    class Old:
        def madvise(self, address: object, size: object, advice: object) -> int:
            return 0 if getattr(advice, "value", advice) == memory._MADV_HUGEPAGE else -1

    monkeypatch.setattr(memory, "_libc", Old)
    assert rk.use_huge_pages(torch.zeros(8 * MEBIBYTE // 4)) is False


@pytest.mark.parametrize("columns", [1, 9, 17, 30, 32, 33, 60, 64, 65, 100, 128, 130, 515])
def test_quantized_rows_cross_few_cache_lines(monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    for apart in (True, False):
        monkeypatch.setattr(memory, "keeps_scales_apart", lambda *size, apart=apart: apart)
        rows, scale_bias = memory.empty_quantized(1000, columns)
        assert (rows.shape, rows.dtype) == ((1000, columns), torch.uint8)
        assert (scale_bias.shape, scale_bias.dtype) == ((1000, 2), torch.float16)
        assert rows.stride(1) == scale_bias.stride(1) == 1
        assert scale_bias.data_ptr() % 2 == 0
        held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in (rows, scale_bias)}
        assert sum(held.values()) <= 1000 * (columns * 9 // 8 + 6)
        if apart:
            # The largest power of two up to a cache line that costs at most an eighth.
            best = max(a for a in (1, 2, 4, 8, 16, 32, 64) if (columns + -columns % a) * 8 <= columns * 9)
            assert rows.stride(0) == columns + -columns % best
        else:
            assert rows.stride(0) == columns + columns % 2 + 4
            assert scale_bias.data_ptr() - rows.data_ptr() == columns + columns % 2
        # Rows and scales are written in full without touching each other.
        rows.fill_(7)
        scale_bias.fill_(0.5)
        assert (rows == 7).all()
        assert (scale_bias == 0.5).all()


def test_doctor_tells_about_huge_pages() -> None:
    assert cli.main(["doctor"]) == 0  # its import once took the place of the function
    assert memory.huge_pages_state() in rk.doctor()["huge_pages"]


def test_what_has_no_memory_of_its_own() -> None:
    with pytest.raises(TypeError, match=r"takes a torch\.Tensor, but got list"):
        rk.use_huge_pages([1])  # type: ignore[arg-type]
    assert not rk.use_huge_pages(torch.zeros(4, 4).to_sparse())
