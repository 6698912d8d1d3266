"""The operand lists in C++ are those of the schemas in Python."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import recsys_kernels  # noqa: F401  (defines the operators)

CSRC = Path(__file__).parents[2] / "csrc"

# What a schema says of an operand, and what C++ makes of it. Symbolic integers come as plain ones.
TYPES = {
    "Tensor": "Tensor",
    "Tensor?": "OptionalTensor",
    "Tensor[]": "Tensors",
    "int": "int64_t",
    "SymInt": "int64_t",
    "bool": "bool",
    "ScalarType": "ScalarType",
}


def expanded(text: str, macros: dict[str, str]) -> str:
    """A list of operands with every list that it names in the place of its name."""
    while inner := re.search(r"\b(RK_\w+)\(X\)", text):
        text = text.replace(inner[0], macros[inner[1]])
    return text


def lists_in_cpp() -> dict[str, list[tuple[str, str]]]:
    """The operands of every operator, as (type, name), from the lists that their structs are made of."""
    text = "\n".join(path.read_text() for path in sorted(CSRC.rglob("*.h"))).replace("\\\n", " ")
    macros = dict(re.findall(r"^#define (RK_\w+)\(X\)(.*)$", text, re.MULTILINE))
    structs = re.findall(r'^RK_OPERANDS\(\w+, "(\w+)",\s*(RK_\w+)\)', text, re.MULTILINE)
    return {name: re.findall(r"\bX\((\w+), (\w+)\)", expanded(macros[macro], macros)) for name, macro in structs}


def operands_of_schema(name: str) -> list[tuple[str, str]]:
    schema = str(getattr(torch.ops.recsys_kernels, name).default._schema)
    inside = re.fullmatch(r"recsys_kernels::\w+\((.*)\) -> .*", schema)
    assert inside is not None, schema
    found = []
    for operand in inside[1].split(", "):
        kind, operand_name = operand.split()
        found.append((TYPES[re.sub(r"\(\w+!\)", "", kind)], operand_name))
    return found


LISTS = lists_in_cpp()


@pytest.mark.parametrize("name", sorted(LISTS))
def test_list_is_that_of_the_schema(name: str) -> None:
    assert LISTS[name] == operands_of_schema(name)


def test_every_native_operator_has_its_list() -> None:
    """``sparse_layer`` on CUDA is ``sparse_linear``; ``int8_layers`` is made of others."""
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    operators = {name.split(".")[0] for name in torch._C._dispatch_get_all_op_names()}
    names = {name.partition("::")[2] for name in operators if name.startswith("recsys_kernels::")}
    native = {name for name in names if any(has_kernel(f"recsys_kernels::{name}", key) for key in ("CPU", "CUDA"))}
    assert set(LISTS) <= native
    assert native - set(LISTS) <= {"sparse_layer", "int8_layers"}


def test_lists_of_equal_operators_are_equal() -> None:
    assert operands_of_schema("sparse_layer") == LISTS["sparse_linear"]


def test_a_list_stands_nowhere_else() -> None:
    """No function for torch's dispatcher takes operands one by one: they come in their struct."""
    sources = [path for suffix in ("cpp", "cu") for path in CSRC.rglob(f"*.{suffix}")]
    registered = 0
    for path in sources:
        text = path.read_text()
        assert "TORCH_BOX" not in text, path
        for function in re.findall(r"implement<&(\w+)>", text):
            registered += 1
            assert re.search(rf"^\S.*\b{function}\(const rk::\w+& o\) {{$", text, re.MULTILINE), (path, function)
    assert registered >= len(LISTS) + 8
