"""Operand tables and what follows from them; families."""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import pytest
import torch

import recsys_kernels as rk
from recsys_kernels.backends import registry
from recsys_kernels.backends.registry import Family, SymInt, Written, families, operators

_BAGS = (
    "Tensor indices, Tensor? offsets, Tensor? per_sample_weights, int mode, int padding_idx, bool include_last_offset"
)
_INT8 = "Tensor weight, Tensor weight_scale, int group, Tensor? bias, Tensor? input_qparams, int scheme, int activation"
_SPARSE = (
    "Tensor values, Tensor crow_indices, Tensor col_indices, int out_features, int in_features, Tensor? weight_scale, "
    "Tensor? bias, Tensor? input_qparams, int scheme, int activation"
)
# Compiled and exported programs name the operands by these schemas: no release may change one.
SCHEMAS = {
    "embedding_bag": f"(Tensor weight, {_BAGS}) -> Tensor",
    "embedding_bag_max": (
        "(Tensor weight, Tensor indices, Tensor? offsets, int padding_idx, bool include_last_offset, bool zero_start)"
        " -> (Tensor, Tensor)"
    ),
    "embedding_bag_backward": f"(Tensor grad, {_BAGS}, SymInt num_embeddings) -> Tensor",
    "embedding_bag_weights_backward": (
        "(Tensor grad, Tensor weight, Tensor indices, Tensor? offsets, int mode, int padding_idx,"
        " bool include_last_offset) -> Tensor"
    ),
    "quantized_embedding_bag": (
        f"(Tensor weight, Tensor scale_bias, int exponent, int embedding_dim, int bits, {_BAGS}, ScalarType dtype)"
        " -> Tensor"
    ),
    "embedding_bag_collection": (
        "(Tensor[] weights, Tensor[] scale_bias, Tensor plan, Tensor indices, Tensor offsets,"
        " Tensor? per_sample_weights, int total_dim, ScalarType dtype) -> Tensor"
    ),
    "quantize_rowwise": "(Tensor weight, int bits, int exponent, Tensor(a!) rows, Tensor(b!) scale_bias) -> ()",
    "int8_linear": f"(Tensor input, {_INT8}, ScalarType dtype) -> Tensor",
    "int8_pack": f"({_INT8}) -> Tensor",
    "int8_chain": "(Tensor input, Tensor packed, int out_features, ScalarType dtype) -> Tensor",
    "int8_layers": (
        "(Tensor input, Tensor[] weights, Tensor[] weight_scales, Tensor?[] biases, Tensor?[] input_qparams,"
        " int[] numbers, ScalarType dtype) -> Tensor"
    ),
    "sparse_linear": f"(Tensor input, {_SPARSE}, ScalarType dtype) -> Tensor",
    "sparse_pack": f"({_SPARSE}, int kind) -> Tensor",
    "sparse_repack": "(Tensor places, Tensor values, Tensor? bias) -> Tensor",
    "sparse_packed": "(Tensor input, Tensor packed, int out_features, ScalarType dtype) -> Tensor",
    "sparse_weight_gradient": (
        "(Tensor grad_output, Tensor input, Tensor crow_indices, Tensor col_indices, int block_rows,"
        " int block_columns, ScalarType dtype) -> Tensor"
    ),
    "sparse_layer": f"(Tensor input, {_SPARSE}, ScalarType dtype) -> Tensor",
}


def test_schemas() -> None:
    own = {name for family in families() if family.package.startswith("recsys_kernels.") for name in family.operators}
    assert own == set(SCHEMAS)
    for name, schema in SCHEMAS.items():
        assert str(operators[name].dispatched._schema) == f"recsys_kernels::{name}{schema}"
        assert operators[name].schema == f"{name}{schema}"


class Inner(NamedTuple):
    weight: torch.Tensor
    scale: float
    names: list[int]


class Outer(NamedTuple):
    input: torch.Tensor | None
    inner: Inner
    rows: SymInt
    out: Written
    more: list[torch.Tensor | None]
    flag: bool
    dtype: torch.dtype


def test_every_type_of_operand() -> None:
    assert registry.schema_of("it", Outer, "()") == (
        "it(Tensor? input, Tensor weight, float scale, int[] names, SymInt rows, Tensor(a!) out, Tensor?[] more,"
        " bool flag, ScalarType dtype) -> ()"
    )


class Unknown(NamedTuple):
    text: str


def test_type_that_no_schema_has() -> None:
    with pytest.raises(TypeError, match="it: operand text has the type <class 'str'>, which no schema has"):
        registry.schema_of("it", Unknown, "()")


def test_flat_arguments_and_back() -> None:
    weight = torch.ones(2)
    call = Outer(None, Inner(weight, 0.5, [1, 2]), 3, weight, [None], True, torch.float16)
    args = registry.flat(call)
    assert args == (None, weight, 0.5, [1, 2], 3, weight, [None], True, torch.float16)
    assert registry.unflat(Outer, args) == call
    with pytest.raises(TypeError, match="Outer has 9 operands, not 8"):
        registry.unflat(Outer, args[1:])


def test_implementations_take_the_fields_of_the_operand_table() -> None:
    for operator in operators.values():
        for module in ("reference", *(["triton"] if operator.has_triton else [])):
            function = getattr(pytest.importorskip(f"{operator.package}.{module}"), operator.name)
            assert list(inspect.signature(function).parameters) == list(operator.operands._fields), operator.name


def test_operators_on_several_devices_say_so() -> None:
    """torch lets the meta device decide, so that a call would give memory that nobody filled."""
    for name, args in registry.operator_samples():
        tensors = [number for number, arg in enumerate(args) if isinstance(arg, torch.Tensor)]
        if len(tensors) > 1:
            moved: list[Any] = list(args)
            moved[tensors[-1]] = args[tensors[-1]].to("meta")
            with pytest.raises(RuntimeError, match=r"is on the meta device, which holds no values, but .* is on cpu"):
                operators[name].dispatched(*moved)


def test_families_name_what_exists() -> None:
    assert [family.name for family in families()][:3] == ["embedding_bag", "int8", "sparse"]
    for family in families():
        for parts in family.shown.values():
            assert set(parts) <= set(family.operators)
        for module in family.modules:
            cls = family.resolve(module)
            assert issubclass(cls, torch.nn.Module)
            assert getattr(rk, cls.__name__) is cls
        for converter in family.converters:
            assert family.resolve(converter)


def test_a_family_has_one_name() -> None:
    with pytest.raises(ValueError, match="there is a family 'int8' already"):
        registry.register(Family("int8", "elsewhere", {}))
