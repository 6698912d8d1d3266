"""Probes of the machine: they read and multiply what they are given."""

from __future__ import annotations

import numpy as np
import pytest

from bench.core import probe
from recsys_kernels.backends.registry import native


def test_probe_reads_every_row_it_is_given() -> None:
    ids = np.arange(4096, dtype=np.int64)[::-1] % 1000
    try:
        for row_bytes in (32, 96, 256):
            for threads in (1, 2):
                limit = probe.probe_reads(ids, 1000, row_bytes, threads)  # raises when its checksum is off
                assert limit.gather > 0 < limit.sequential
    except probe.ProbeUnavailableError as error:
        pytest.skip(str(error))
    with pytest.raises(ValueError, match="multiple of 32"):
        probe.probe_reads(ids, 1000, 33)


@pytest.mark.parametrize(("kind", "instruction"), [("int8", "vp"), ("float", "vfmadd")])
def test_probes_multiply_what_they_are_given(kind: str, instruction: str) -> None:
    run = getattr(probe, f"probe_{kind}")
    best = native.isa_supported()
    if best in (None, "generic"):
        pytest.skip(f"no instructions to probe: {best}")
    try:
        for threads in (1, 2):
            limit = run(best, threads, rounds=10_000)  # raises when its sum is off
            assert limit.rate > 0
            assert instruction in limit.how
        assert "256 bits" in run("avx2", rounds=10_000).how
    except probe.ProbeUnavailableError as error:
        pytest.skip(str(error))
    with pytest.raises(probe.ProbeUnavailableError, match=f"no {kind}.* probe at the level generic"):
        run("generic")
