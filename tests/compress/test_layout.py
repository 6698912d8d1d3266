"""The parts of compress depend on each other in one direction."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import recsys_kernels
from recsys_kernels.compress.converters.converter import REGISTERED

FOLDER = Path(recsys_kernels.__file__).parent / "compress"
# The folders that a folder of compress may import, beside itself and the files at the top.
MAY_IMPORT = {
    "converters": set(),
    "rewrite": {"converters"},
    "quantize": {"rewrite", "converters"},
    "prune": {"rewrite", "converters"},
}


def imported_folders(file: Path) -> set[str]:
    """The folders of compress that a file imports, as relative imports name them."""
    depth = len(file.relative_to(FOLDER).parts)
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level == depth:
            names = [node.module.split(".")[0]] if node.module else [alias.name for alias in node.names]
            found |= set(names) & set(MAY_IMPORT)
    return found


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_imports_point_one_way(folder: str) -> None:
    files = list((FOLDER / folder).rglob("*.py"))
    assert len(files) >= 3
    for file in files:
        assert imported_folders(file) <= MAY_IMPORT[folder], file


def test_every_folder_is_known_and_imports_are_seen() -> None:
    assert {path.name for path in FOLDER.iterdir() if path.is_dir()} - {"__pycache__"} == set(MAY_IMPORT)
    assert imported_folders(FOLDER / "rewrite" / "plan.py") == {"converters"}
    assert imported_folders(FOLDER / "prune" / "neurons.py") == {"rewrite", "converters"}


def test_every_choice_has_one_converter() -> None:
    choices = [(converter.option, choice) for converter in REGISTERED for choice in converter.choices]
    assert len(choices) == len(set(choices)) >= 8
