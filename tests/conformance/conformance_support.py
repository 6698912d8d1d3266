"""What the conformance tests share: every operator and module of every registered family, with its samples."""

from __future__ import annotations

import os
import pickle
import threading
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from recsys_kernels.backends import registry, selection
from recsys_kernels.backends.registry import native

OPERATORS = tuple(registry.operators)
MODULES = {
    f"{family.name} {sample.name}": sample
    for family in registry.families()
    if family.module_samples is not None
    for sample in family.resolve(family.module_samples)()
}
# What a wrong argument raises. A segmentation fault, or a result, is none of these.
ERRORS = (TypeError, ValueError, RuntimeError, IndexError)


def public_modules() -> set[type[torch.nn.Module]]:
    """The classes of modules that the families name."""
    return {family.resolve(name) for family in registry.families() for name in family.modules}


def calls() -> dict[str, list[tuple[Any, ...]]]:
    """The arguments of the sample calls of every operator, with packs that the implementation in use has made."""
    return _calls(selection.chosen("int8_pack", "cpu"), native.isa())


@cache
def _calls(backend: str, isa: str | None) -> dict[str, list[tuple[Any, ...]]]:
    torch.manual_seed(0)
    found: dict[str, list[tuple[Any, ...]]] = {}
    for name, args in registry.operator_samples():
        found.setdefault(name, []).append(args)
    return found


def operator(name: str) -> Callable[..., Any]:
    """torch's operator of that name."""
    return registry.operators[name].dispatched


def copied(args: Any) -> Any:
    """The same arguments with tensors of their own: one operator writes to its arguments."""
    return torch.utils._pytree.tree_map_only(torch.Tensor, torch.clone, args)


def run(name: str, args: tuple[Any, ...]) -> list[torch.Tensor]:
    """The tensors that a call gives, or those that it wrote to."""
    args = copied(args)
    out = operator(name)(*args)
    if out is None:
        schema = torch._C._jit_get_schemas_for_operator(f"recsys_kernels::{name}")[0]
        out = [arg for arg, known in zip(args, schema.arguments, strict=True) if known.alias_info is not None]
    return [out] if isinstance(out, torch.Tensor) else list(out)


def same(one: Any, two: Any) -> bool:
    """Whether two results hold the same bits in the same shapes, NaN included."""
    pairs = zip(one, two, strict=True) if isinstance(one, (list, tuple)) else [(one, two)]
    return all(
        a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.nan_to_num(nan=12345.0), b.nan_to_num(nan=12345.0))
        for a, b in pairs
    )


def in_threads(work: Callable[[], Any], count: int = 4) -> list[Any]:
    """What some work gives in several threads that start it together."""
    results: list[Any] = [None] * count
    together = threading.Barrier(count)

    def run_one(number: int) -> None:
        together.wait()
        results[number] = work()

    threads = [threading.Thread(target=run_one, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


class ModuleResults(torch.utils.data.Dataset):
    """A data set whose items are what modules give for their inputs, computed in the loader's workers."""

    def __init__(self, modules: list[torch.nn.Module], inputs: list[tuple[Any, ...]]) -> None:
        self.modules, self.inputs, self.parent = list(map(pickle.dumps, modules)), inputs, os.getpid()

    def __len__(self) -> int:
        return len(self.modules)

    def __getitem__(self, number: int) -> torch.Tensor:
        assert os.getpid() != self.parent
        with torch.no_grad():
            return pickle.loads(self.modules[number])(*self.inputs[number])
