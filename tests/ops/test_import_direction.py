"""Operators and backends import one another in one direction."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import recsys_kernels

PACKAGE = Path(recsys_kernels.__file__).parent


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(path): path for folder in ("backends", "ops") for path in sorted((PACKAGE / folder).rglob("*.py"))}


def imported(name: str, path: Path) -> set[str]:
    """The modules of ``ops`` and ``backends`` that a module imports when it is imported itself."""
    found = set()
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.parse(path.read_text()).body:
        if not isinstance(node, ast.ImportFrom):
            continue
        base = package.rsplit(".", node.level - 1)[0] if node.level > 1 else package
        target = f"{base}.{node.module}" if node.level and node.module else base if node.level else str(node.module)
        for alias in node.names:
            inner = f"{target}.{alias.name}"
            found.add(inner if inner in FILES else target)
    return {module for module in found if module in FILES and module != name}


GRAPH = {name: imported(name, path) for name, path in FILES.items()}


def test_no_module_imports_itself_by_way_of_others() -> None:
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path[path.index(name) :], name))
        if name not in done:
            for other in GRAPH[name]:
                visit(other, (*path, name))
            done.add(name)

    for name in GRAPH:
        visit(name, ())
    assert len(done) > 40
    assert "recsys_kernels.backends.registry" in GRAPH["recsys_kernels.ops.linear.int8.spec"]


@pytest.mark.parametrize("family", ["embedding_bag", "linear.int8", "linear.sparse"])
def test_families_and_backends_do_not_import_other_families(family: str) -> None:
    folder = f"recsys_kernels.ops.{family}"
    others = {f"recsys_kernels.ops.{name}" for name in ("embedding_bag", "linear.int8", "linear.sparse")} - {folder}
    for name, found in GRAPH.items():
        if name.startswith((folder, "recsys_kernels.backends")):
            assert not [module for module in found if module.startswith(tuple(others))], name


def test_backends_know_no_operator() -> None:
    for name, found in GRAPH.items():
        if name.startswith("recsys_kernels.backends"):
            assert not [module for module in found if module.startswith("recsys_kernels.ops")], name
