"""The emulation itself: kernels that are wrong on purpose are reported, and right ones give what they should."""

from __future__ import annotations

import functools
import os
import re
import subprocess
from pathlib import Path

import pytest
from cuda_support import ROOT, require_toolkit

from .support import HERE, cache_folder, compiled, require


@pytest.fixture(autouse=True, scope="module")
def _emulation_is_there() -> None:
    require()


PROGRAMS = HERE / "programs"
SEEDS = 12  # four of each strategy


@functools.cache
def program(build: str) -> Path:
    folder = compiled(build, cache_folder(build, "programs"), [], sorted(PROGRAMS.glob("*.cu")))
    return folder / "program"


def run(build: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    environment |= {"ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"}
    command = [str(program(build)), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)


MEET = "all threads of a block must meet at the same one"
GET_THERE = "has ended, but .* all threads of a block must get there|have ended and will not get there"
ELSEWHERE = "waits for lanes one of which waits for this one elsewhere"
SHARED = r"\d bytes of .* shared memory.*"
UNWRITTEN = f"reads {SHARED}, which no thread of this block has written"
NOT_DEVICE = "which are not the device's, or past the end of a tensor"
RACE = "with no barrier between the two"

# What is said of the wrong version of each case: what both builds see, whatever the seed.
REPORTS = {
    "two_barriers": rf"at barriers.cu:\d+: __syncthreads, but .* at barriers.cu:\d+: {MEET}",
    "barrier_of_a_function": f"barriers.cu:.*, called at barriers.cu:.*{MEET}",
    "different_barriers": f"__syncthreads_(or|count), but .* waits in __syncthreads_(count|or).*{MEET}",
    "barrier_after_the_end": GET_THERE,
    "barrier_for_some": GET_THERE,
    "shuffle_outside_of_the_mask": "which does not name this lane|reads from lane .*, which does not take part",
    "shuffle_reads_outside_of_the_mask": r"lane (\d+) reads from lane \d+, which does not take part",
    "shuffle_with_ended_lanes": "has ended, but .* with a mask that names this thread|names lane .*, which has ended",
    "shuffle_with_lanes_that_do_not_exist": "names lane 8, which has ended or does not exist",
    "shuffle_at_two_places": ELSEWHERE,
    "shuffle_of_a_function": ELSEWHERE,
    "shuffle_of_an_inlined_function": ELSEWHERE,
    "different_masks": f"{ELSEWHERE}|has ended, but .* with a mask that names this thread",
    "shuffle_and_barrier": "__shfl_xor_sync .*but .* waits in __syncthreads|waits for all threads .*with a mask",
    "shuffle_by_32": "__shfl_down_sync by 32 lanes",
    "width_of_12": "__shfl_xor_sync with width 12",
    "ring": "deadlock: no thread can go on; .* waits in __syncwarp",
    "wait_for_a_flag": "no thread has got anywhere for a long time",
    "misaligned_ldg": "__ldg of 8 bytes at an address that is not a multiple of it",
    "atomic_on_a_variable": "atomicAdd on a local variable",
    "no_blocks": r"launching one_each: invalid configuration argument \(the grid is 0 x 1 x 1 blocks\)",
    "too_many_threads": r"launching one_each: invalid configuration argument \(the block is 1025 x 1 x 1 threads\)",
    "too_deep": r"launching one_each: invalid configuration argument \(the block is 1 x 1 x 65 threads\)",
    "too_much_shared": r"invalid argument \(49153 bytes of dynamic shared memory, 49152 may be used\)",
    "more_shared_without_asking": r"launching one_each: invalid argument \(61440 bytes",
    "more_shared_than_there_is": "asking for shared memory: invalid argument",
    "kernel_launches_a_kernel": "a kernel cannot launch a kernel",
    "mma": "has ended, but .* waits in mma.sync .*|mma.sync with mask .* names lane 7, which has ended",
}

# Without these checks the kernels run, and what they give is wrong, for every seed: the poison is what is seen.
_POISONED = {
    "missing_barrier": f"{UNWRITTEN}|{RACE}",
    "missing_second_barrier": RACE,
    "missing_warp_barrier": f"{UNWRITTEN}|{RACE}",
    "warp_barrier_of_a_part": f"{UNWRITTEN}|{RACE}",
    "uninitialized_shared": UNWRITTEN,
    "uninitialized_dynamic_shared": UNWRITTEN,
    "shared_of_the_last_block": UNWRITTEN,
}

CHECKED = (
    REPORTS
    | _POISONED
    | {
        "shuffle_for_a_barrier": RACE,
        "lost_update": RACE,
        "race_of_blocks": RACE,
        "plain_and_atomic": f"(atomic.*){{1,2}}{RACE}",
        "neighbouring_bytes": f"writes 1 bytes .*{RACE}",
        "ldg_of_what_is_written": "reads by __ldg, for which nobody may write there",
        "write_after_ldg": "read by __ldg, for which nobody may write there",
        "variable_of_another_thread": "touches a local variable of another thread",
        "variable_of_the_host": "touches the host's stack",
        "memory_of_the_host": f"at memory.cu:.*{NOT_DEVICE}",
        "host_reads_the_device": r"^simt: code of the host touches memory of the device, at memory.cu:\d+$",
        "read_too_far": f"at memory.cu:.* touches 4 bytes .*{NOT_DEVICE}",
        "write_too_far": f"at memory.cu:.* touches 4 bytes .*{NOT_DEVICE}",
        "read_nowhere": f"at memory.cu:.*{NOT_DEVICE}",
        "too_many_calls": "need more stack than there is",
        "dynamic_shared_too_far": "touches 4 bytes of memory outside of the dynamic shared memory",
        "static_shared_too_far": "an index past the end of an array",
        "misaligned_vector": r"at memory.cu:\d+: misaligned: global memory at .* is not a multiple of 16",
        "overflow": "a product of signed integers overflows",
        "uninitialized_variable": "wrong result",
    }
)

# What ends the process under AddressSanitizer and UBSan. The report names the line.
ENDED = {
    "read_too_far": r"heap-buffer-overflow .*\n.*READ of size 4(.*\n)*.* in read_too_far.*memory.cu:\d+",
    "write_too_far": r"heap-buffer-overflow .*\n.*WRITE of size 4(.*\n)*.* in write_too_far.*memory.cu:\d+",
    "read_nowhere": r"SEGV (.*\n)*.* in read_nowhere.*memory.cu:\d+",
    "too_many_calls": r"stack-overflow (.*\n)*.* in deep.*memory.cu:\d+",
    "dynamic_shared_too_far": r"use-after-poison (.*\n)*.* in dynamic_shared_too_far.*memory.cu:\d+",
    "static_shared_too_far": r"memory.cu:\d+:\d+: runtime error: index 2 out of bounds for type 'float \[2\]'",
    "misaligned_vector": r"memory.cu:\d+:\d+: runtime error: .* misaligned address",
    "overflow": r"memory.cu:\d+:\d+: runtime error: signed integer overflow",
}


def names(wrong: bool) -> list[str]:
    listed = [line.split() for line in run("checked").stdout.splitlines()]
    return [words[0] for words in listed if not wrong or words[1:] == ["wrong"]]


def test_no_wrong_kernel_was_forgotten() -> None:
    assert set(names(wrong=True)) == set(CHECKED) | set(ENDED) | {"active_lanes"}


@pytest.mark.parametrize("build", ["checked", "address"])
def test_right_kernels_pass(build: str) -> None:
    for name in names(wrong=False):
        done = run(build, name, "right", 0, SEEDS)
        assert done.stdout.splitlines() == ["ok"] * SEEDS, f"{name}: {done.stdout}{done.stderr[:3000]}"


@pytest.mark.parametrize("name", CHECKED)
def test_wrong_kernel_is_reported(name: str) -> None:
    lines = run("checked", name, "wrong", 0, SEEDS).stdout.splitlines()
    assert len(lines) == SEEDS
    for seed, line in enumerate(lines):
        assert re.search(CHECKED[name], line), f"seed {seed}: {line}"


@pytest.mark.parametrize("name", [*REPORTS, *_POISONED])
def test_wrong_kernel_is_seen_under_sanitizers(name: str) -> None:
    lines = run("address", name, "wrong", 0, SEEDS).stdout.splitlines()
    assert len(lines) == SEEDS
    for seed, line in enumerate(lines):
        assert re.search(REPORTS.get(name, "^wrong result$"), line), f"seed {seed}: {line}"


@pytest.mark.parametrize("name", ENDED)
def test_sanitizers_stop_a_wrong_kernel(name: str) -> None:
    for seed in range(3):
        done = run("address", name, "wrong", seed, 1)
        assert done.returncode != 0
        assert done.stdout == ""
        assert re.search(ENDED[name], done.stderr), done.stderr[:3000]


def test_lanes_need_not_be_together() -> None:
    """__activemask names all lanes at some seeds and fewer at others, as it may."""
    lines = run("checked", "active_lanes", "wrong", 0, SEEDS).stdout.splitlines()
    assert set(lines) == {"ok", "wrong result"}
    assert lines[0] == "ok"  # in turn, all are there


def test_seed_gives_the_same_order_again() -> None:
    """The thread that a report names is a matter of the order."""
    first, again = (run("checked", "two_barriers", "wrong", 0, SEEDS).stdout for _ in range(2))
    assert first == again
    assert len(set(first.splitlines())) > SEEDS / 2


def test_nvcc_compiles_what_the_emulation_runs(tmp_path: Path) -> None:
    """Else the emulation would accept what no GPU does."""
    sources = sorted(PROGRAMS.glob("*.cu"))
    assert len(sources) > 3
    for source in sources:
        ptx = tmp_path / f"{source.stem}.ptx"
        nvcc("-arch=sm_90", "-ptx", source, "-o", ptx)
        # main.cu only calls what the others hold.
        assert (".entry" in ptx.read_text()) == (source.name != "main.cu"), source.name


def nvcc(*arguments: str | Path) -> None:
    command = [require_toolkit().nvcc, "-std=c++17", f"-I{ROOT / 'csrc'}", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{arguments}: {done.stderr[-3000:]}"


@pytest.mark.parametrize("architecture", [80, 90, 100, 120])
def test_matrix_product_is_one_instruction(architecture: int, tmp_path: Path) -> None:
    """What csrc/cuda/mma.cuh emulates is what it makes of PTX, and ptxas makes code of it."""
    options = [f"-arch=sm_{architecture}", "-cubin", f"-keep-dir={tmp_path}", "-keep"]
    nvcc(*options, PROGRAMS / "matrices.cu", "-o", tmp_path / "matrices.cubin")
    (ptx,) = tmp_path.glob("*.ptx")
    kernels = ptx.read_text().split(".entry")[1:]
    right = next(text for text in kernels if "multiplyILb1E" in text.split("(")[0])
    assert re.findall(r"\bmma\S+", right) == ["mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32"]
