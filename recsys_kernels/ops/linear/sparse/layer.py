"""A linear layer whose weights are pruned."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch
from torch.autograd import forward_ad

from ....backends import selection
from ..activation import (
    MIN_SCALE,
    STATIC,
    WEIGHT_ONLY,
    epilogue_number,
    input_qparams,
    scheme_number,
)
from ..gradients import autocast_type, check_tensor, is_traced, is_transformed
from ..layer import (
    MODULES,
    FixedTypes,
)
from ..operands import (
    FLOATS,
    GROUPS,
    MAX_IN_FEATURES,
)
from ..prepared import Prepared, count_writes, trained
from . import autograd as op
from . import crossover, formats, reference, semi_structured, state
from .formats import Stored
from .packs import Packs, runs_packed
from .patterns import parse_pattern
from .spec import SparseLayer, block_shape
from .structure import Structure
from .torch_masks import as_called

# What ``selection.implementation`` gives unless another backend was asked for.
PACKED = torch.ops.recsys_kernels.sparse_packed.default
DENSE = torch.ops.recsys_kernels.int8_chain.default
RUN_PACKED, RUN_DENSE = selection.without_wrapper(PACKED), selection.without_wrapper(DENSE)
T = TypeVar("T")
_STRUCTURE = ("values", "crow_indices", "col_indices")


class SparseLinear(FixedTypes):
    """``torch.nn.Linear`` with pruned weights: only those that are kept are stored, read, multiplied and trained.

    Weights are floats, or int8 with the arithmetic of :class:`~recsys_kernels.Int8Linear`. Sums are taken in float32
    (int8 with one scale a row: exactly). NaN and infinity of the input go through kept weights only, but where a layer
    runs dense, which is as ``torch.nn.Linear`` with zeros in place.

    State (``state_dict``): ``values`` of the kept weights, a parameter if they are floats; ``crow_indices`` and
    ``col_indices``, where they are:

    - ``"unstructured"``: values [nnz], int32 [out_features + 1] and int32 [nnz], as in compressed sparse rows
    - ``"block{r}x{c}"``, r rows and c columns each 1, 4 or 16: values [blocks, r, c], the same of blocks
    - ``"2:4"``: values [out_features, ceil(in_features / 4) * 2], crow_indices empty, col_indices uint8
      [out_features, ceil(in_features / 8)], 4 bits for every four columns, see ``functional.sparse_linear``

    and ``bias`` [out_features]; of int8 layers ``weight_scale`` float32 [out_features], or [out_features, groups] of
    32, 64 or 128 columns each, and (``"static"``) ``input_qparams`` float32 [2]. What is loaded may keep any number of
    weights, with scales of either kind; it is checked first. On the CPU the kernels read a packed copy, which is made
    at the first call and again when one of these was replaced or written to, but not where torch does not count it (see
    :meth:`refresh`). In training, values are put into their places at every call. A layer that was trained is compared
    with what was packed at every call: ``requires_grad_(False)`` ends that.

    ``torch.jit.trace`` of a layer in training mode gives a graph with gradients, in torch's own operators; of a layer
    in evaluation mode a graph that calls one operator and has none.

    Gradients go to the input, float values (at kept places only, no dense gradient exists) and bias. ``.half()`` and
    the like convert float layers; of int8 layers they choose the type of the output.

    On the CPU a layer that is faster as a dense one (see ``repr`` and ``recsys_kernels.doctor()``) runs as one where
    nothing is trained. On a GPU that has a unit for 2:4 (sm_80 and newer), float16 and bfloat16 layers of that pattern
    use it through torch.

    A new layer keeps nothing, to load a state into; :meth:`from_dense` prunes one, :meth:`from_sparse` takes what is
    sparse.

    Args:
        in_features: from 1; of int8 products up to 65536 (beyond, sums would overflow int32).
        out_features: from 1.
        bias: whether there is one.
        pattern: ``"unstructured"``, ``"block{r}x{c}"`` or ``"2:4"``.
        epilogue: a function that is applied to the result: None, ``"relu"``, ``"gelu"`` (erf), ``"sigmoid"`` or
            ``"silu"``.
        activation: None for float values. For int8 values it says how the layer takes its input: ``"dynamic"``,
            ``"static"`` (by ``input_range``) or ``"weight_only"``.
        input_range: (low, high) of the input, for ``"static"``. A layer to load a state into can do without.
        dtype: of float values, and of the output: float32, float16 or bfloat16. The input may have any of them.
        device: where the layer lives.

    Raises:
        ValueError: an argument that is none of these.
    """

    values: torch.Tensor
    crow_indices: torch.Tensor
    col_indices: torch.Tensor
    weight_scale: torch.Tensor | None
    bias: torch.nn.Parameter | None
    input_qparams: torch.Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        pattern: str = "unstructured",
        epilogue: str | None = None,
        activation: str | None = None,
        input_range: tuple[float, float] | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        dtype = dtype or torch.get_default_dtype()
        if dtype not in FLOATS:
            raise ValueError(f"a sparse layer gives float32, float16 or bfloat16, but dtype is {dtype}")
        super().__init__(dtype)
        if in_features < 1 or out_features < 1:
            raise ValueError(f"in_features and out_features must be at least 1, but are {in_features}, {out_features}")
        scheme = WEIGHT_ONLY if activation is None else scheme_number(activation)
        if scheme != WEIGHT_ONLY and in_features > MAX_IN_FEATURES:
            raise ValueError(f"in_features of an int8 product must be 1 to {MAX_IN_FEATURES}, but is {in_features}")
        if input_range is not None and activation != "static":
            raise ValueError(f"input_range is for activation='static', but activation is {activation!r}")
        parsed = parse_pattern(pattern)
        if formats.stored_pattern(parsed) != parsed:
            raise ValueError(f"a layer stores 'unstructured', blocks or '2:4', but pattern is {pattern!r}")
        self.in_features, self.out_features = in_features, out_features
        self.activation, self.epilogue = activation, epilogue
        self._pattern, self._scheme, self._epilogue = parsed, scheme, epilogue_number(epilogue)
        with torch.inference_mode(False):  # inference tensors would not say when they are written to
            stored = formats.empty(out_features, in_features, parsed, dtype if activation is None else torch.int8)
            self._set(Stored(*(part.to(device or torch.get_default_device()) for part in stored)))
            zeros = torch.zeros(out_features, dtype=dtype if activation is None else torch.float32, device=device)
            self.register_parameter("bias", torch.nn.Parameter(zeros) if bias else None)
            scale = torch.full((out_features,), MIN_SCALE, dtype=torch.float32, device=device)
            self.register_buffer("weight_scale", None if activation is None else scale)
            qparams = None
            if scheme == STATIC:
                # Without a range the scale is 0, which forward() refuses.
                qparams = torch.zeros(2) if input_range is None else input_qparams(*input_range)
            self.register_buffer("input_qparams", None if qparams is None else qparams.to(zeros.device))
        # Fused optimizers write to parameters without counting them as written to. So once a call was recorded for
        # their gradient their values are compared.
        self._trains = False
        self._forget()

    def _forget(self) -> None:
        self._prepared: Prepared[Packs | semi_structured.Product] | None = None
        self._structure: Prepared[Structure] | None = None

    def _set(self, stored: Stored, requires_grad: bool = True) -> None:
        if self.activation is None:
            self.register_parameter("values", torch.nn.Parameter(stored.values, requires_grad))
        else:
            self.register_buffer("values", stored.values)
        self.register_buffer("crow_indices", stored.crow_indices)
        self.register_buffer("col_indices", stored.col_indices)

    @classmethod
    def from_dense(
        cls,
        linear: torch.nn.Linear,
        sparsity: float | str | None = "default",
        pattern: str = "unstructured",
        *,
        epilogue: str | None = None,
    ) -> SparseLinear:
        """Prunes a layer: of its weights, or blocks of them, those with the lowest magnitudes are dropped.

        (Han et al., "Learning both Weights and Connections for Efficient Neural Networks", 2015.) The layer itself is
        not changed. If its weight is parametrized or has a mask (also one of ``torch.nn.utils.prune``), it is taken as
        a call would take it.

        Args:
            linear: the layer.
            sparsity: the share to drop; the default is 0.9, of n:m patterns theirs. None: what is zero is dropped, of
                a layer that has been pruned.
            pattern: ``"unstructured"``, ``"block{r}x{c}"`` or ``"n:m"`` (all but 2:4 are stored as unstructured).
            epilogue: see the class.

        Raises:
            TypeError: not such a module.
            ValueError: an unknown option, a sparsity that the pattern can't have; weights in float64, or that hold NaN
                or infinity; with None more than n weights of m.
        """
        if not isinstance(linear, torch.nn.Linear):
            raise TypeError(f"linear must be a torch.nn.Linear, but is a {type(linear).__name__}")
        weight, bias, units = as_called(linear, "weight"), as_called(linear, "bias"), parse_pattern(pattern)
        assert weight is not None
        stored_as = formats.stored_pattern(units)
        new = cls(
            weight.shape[1],
            weight.shape[0],
            bias is not None,
            pattern=stored_as.name,
            epilogue=epilogue,
            dtype=weight.dtype,
            device=weight.device,
        )
        with torch.inference_mode(False), torch.no_grad():
            kept_weights = formats.kept_weights(weight.detach(), sparsity, units)
            new._set(formats.store(weight.detach().clone(), kept_weights, stored_as), weight.requires_grad)
            new._take_bias(bias)
        return new.train(linear.training)

    @classmethod
    def from_sparse(
        cls, tensor: torch.Tensor, bias: torch.Tensor | None = None, *, epilogue: str | None = None
    ) -> SparseLinear:
        """A layer with the weights of a sparse matrix; the tensors are copied.

        Args:
            tensor: [out_features, in_features] in torch's layout ``torch.sparse_csr`` or ``torch.sparse_bsr``, of
                float32, float16 or bfloat16.
            bias: [out_features], or None.
            epilogue: see the class.

        Raises:
            TypeError: another layout.
            ValueError: not a matrix; another type; blocks of a size that no pattern has.
            IndexError, RuntimeError: a malformed structure, with the position.
        """
        layout = tensor.layout if isinstance(tensor, torch.Tensor) else type(tensor).__name__
        if layout not in (torch.sparse_csr, torch.sparse_bsr):
            raise TypeError(f"tensor must be in the layout torch.sparse_csr or torch.sparse_bsr, but is {layout}")
        if tensor.dim() != 2:
            raise ValueError(f"tensor must be a matrix, but has {tensor.dim()} dimensions")
        n, k = tensor.shape
        values = tensor.values().detach().clone().contiguous()
        if values.dim() == 3 and values.shape[1:] == (1, 1):
            values = values.reshape(-1)
        # Before they are rounded to 32 bits.
        reference.check_structure(tensor.crow_indices(), tensor.col_indices(), n, k, *block_shape(values))
        structure = tensor.crow_indices().int(), tensor.col_indices().int()
        options = {"pattern": formats.pattern_name(values), "epilogue": epilogue}
        new = cls(k, n, bias is not None, **options, dtype=values.dtype, device=values.device)  # type: ignore[arg-type]
        with torch.inference_mode(False), torch.no_grad():
            new._set(Stored(values, *(part.clone() for part in structure)), tensor.requires_grad)
            new._take_bias(bias)
        return new

    def _take_bias(self, bias: torch.Tensor | None) -> None:
        if self.bias is not None and bias is not None:
            if bias.shape != self.bias.shape:
                raise ValueError(f"bias must have shape {tuple(self.bias.shape)}, but has {tuple(bias.shape)}")
            self.bias.copy_(bias)
            self.bias.requires_grad_(bias.requires_grad)

    # ---- conversions ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def quantize(
        self,
        activation: str = "dynamic",
        *,
        input_range: tuple[float, float] | None = None,
        granularity: str | int = "channel",
    ) -> SparseLinear:
        """A layer with the same weights in int8: symmetric, by the largest of those that share a scale.

        Args:
            activation: how it takes its input: ``"dynamic"``, ``"static"`` or ``"weight_only"``, see the class.
            input_range: (low, high) of the input, for ``"static"``.
            granularity: what shares a scale: ``"channel"`` (an output channel), ``"tensor"``, or 32, 64 or 128 columns
                of a channel. With these weights, and quantized inputs, are multiplied as the floats that they stand
                for, and on the CPU packed as such.

        Raises:
            ValueError: an unknown option, ``"static"`` without a range, NaN or infinity among the weights or biases
                (named).
            RuntimeError: the layer has int8 weights already.
        """
        if self.activation is not None:
            raise RuntimeError("the layer has int8 weights already")
        if activation == "static" and input_range is None:
            raise ValueError("activation='static' needs input_range=(low, high), the range of the layer's input")
        if granularity not in ("channel", "tensor", *GROUPS):
            raise ValueError(f"granularity must be 'channel', 'tensor', 32, 64 or 128, but is {granularity!r}")
        scheme_number(activation)  # which None is not
        new = SparseLinear(
            self.in_features,
            self.out_features,
            self.bias is not None,
            pattern=self.pattern,
            epilogue=self.epilogue,
            activation=activation,
            input_range=input_range,
            dtype=self.dtype,
            device=self.values.device,
        )
        with torch.inference_mode(False), torch.no_grad():
            sizes = self.out_features, self.in_features
            values, new.weight_scale = formats.quantize(self._stored(), *sizes, granularity)
            new._set(Stored(values, self.crow_indices.clone(), self.col_indices.clone()))
            if self.bias is not None and not torch.isfinite(self.bias).all():
                at = int((~torch.isfinite(self.bias)).nonzero()[0])
                raise ValueError(f"element {at} of bias is NaN or infinity")
            new._take_bias(self.bias)
        return new.train(self.training)

    def dequantize(self) -> torch.Tensor:
        """The weights as a matrix of floats with zeros in place, [out_features, in_features] of type ``self.dtype``."""
        stored, sizes = self._stored(), (self.out_features, self.in_features)
        if self.weight_scale is not None:
            stored = stored._replace(values=reference.dequantized(*stored, *sizes, self.weight_scale))
        return formats.to_dense(stored, *sizes).detach().to(self.dtype)

    @torch.no_grad()
    def to_dense(self) -> torch.nn.Module:
        """A ``torch.nn.Linear`` with zeros in place; with an epilogue, that and its module in a Sequential."""
        linear = torch.nn.Linear(
            self.in_features, self.out_features, self.bias is not None, self.values.device, self.dtype
        )
        linear.weight.copy_(self.dequantize())
        if self.bias is not None:
            linear.bias.copy_(self.bias)
            linear.bias.requires_grad_(self.bias.requires_grad)
        if self.epilogue is None:
            return linear.train(self.training)
        return torch.nn.Sequential(linear, MODULES[self.epilogue]()).train(self.training)

    # ---- what it is -------------------------------------------------------------------------------------------------

    @property
    def pattern(self) -> str:
        """``"unstructured"``, ``"block{r}x{c}"`` or ``"2:4"``."""
        return self._pattern.name

    @property
    def nnz(self) -> int:
        """How many weights are stored: whole blocks, and two of every four columns."""
        return self.values.numel()

    @property
    def sparsity(self) -> float:
        """The share of weights that are not stored."""
        return max(0.0, 1.0 - self.nnz / (self.in_features * self.out_features))

    def extra_repr(self) -> str:
        parts = [f"{self.in_features}, {self.out_features}, bias={self.bias is not None}"]
        parts.append(f"pattern={self.pattern!r}, sparsity={self.sparsity:.4g}")
        for name in ("activation", "epilogue"):
            if getattr(self, name) is not None:
                parts.append(f"{name}={getattr(self, name)!r}")
        if self._group():
            parts.append(f"granularity={self._group()}")
        if self.dtype != torch.float32:
            parts.append(f"dtype={self.dtype}")
        if runs_packed(self.values):
            parts.append(f"runs: {self._how_it_runs()}")
        return ", ".join(parts)

    def _group(self) -> int:
        scale = self.weight_scale
        return 0 if scale is None else reference.scale_group(self.out_features, self.in_features, scale.shape)

    def _how_it_runs(self) -> str:
        few, many = crossover.runs_dense(self.operands())
        limits = crossover.limits_of(self.operands())
        if not few and not many:
            return "sparse"
        if few and many:
            what = "weights" if self._scheme == WEIGHT_ONLY or self._group() else "fours of columns"
            return f"dense (less than {1 - max(limits):.0%} of its {what} are zero)"
        return f"dense with {'up to' if few else 'more than'} {crossover.FEW_ROWS} rows, else sparse"

    # ---- the packed copy --------------------------------------------------------------------------------------------

    def _stored(self) -> Stored:
        return Stored(self.values, self.crow_indices, self.col_indices)

    def is_fresh(self, prepared: Prepared[Any]) -> bool:
        """Whether something was made of the layer's tensors as they are now."""
        # Straight from the dicts: a request of one row takes a few us.
        buffers, parameters = self._buffers, self._parameters
        return prepared.is_fresh(
            (parameters if self.activation is None else buffers)["values"],  # type: ignore[arg-type]
            parameters["bias"],
            buffers["weight_scale"],
            buffers["input_qparams"],
            buffers["crow_indices"],
            buffers["col_indices"],
        ) and (not self._trains or prepared.has_values(trained(self)))

    def _prepare(self, value: T) -> Prepared[T]:
        """What was made of the layer, with what tells whether the layer has changed since."""
        tensors = self.values, self.bias, self.weight_scale, self.input_qparams, self.crow_indices, self.col_indices
        return Prepared(value, tensors, trained(self) if self._trains else None)

    def operands(self) -> SparseLayer:
        """The layer as the operators take it: from ``values`` to ``activation``."""
        buffers, parameters = self._buffers, self._parameters
        values = (parameters if self.activation is None else buffers)["values"]
        crow, col = buffers["crow_indices"], buffers["col_indices"]
        assert values is not None
        assert crow is not None
        assert col is not None
        scale, bias, qparams = buffers["weight_scale"], parameters["bias"], buffers["input_qparams"]
        numbers = self._scheme, self._epilogue
        sizes = self.out_features, self.in_features
        return SparseLayer(values, crow, col, *sizes, scale, bias, qparams, *numbers)

    def _current(self, make: type[T]) -> T:
        """What the CPU, or a GPU's unit for 2:4, reads instead of the operands, as fresh as the state.

        Args:
            make: the class of it, which takes the operands.
        """
        prepared = self._prepared
        if prepared is None or type(prepared.value) is not make or not self.is_fresh(prepared):
            self._prepared = None
            count_writes(self)
            self._prepared = prepared = self._prepare(make(self.operands()))  # type: ignore[call-arg,arg-type]
        return prepared.value  # type: ignore[return-value]

    def _current_structure(self) -> Structure:
        """What follows from the structure, which training does not change."""
        crow, col, values = self.crow_indices, self.col_indices, self.values
        prepared = self._structure
        if prepared is None or prepared.value.shape != values.shape or not prepared.is_fresh(crow, col, None, None):
            count_writes(self)
            made = Structure(self.operands())
            self._structure = prepared = Prepared(made, (self.crow_indices, self.col_indices))
        return prepared.value

    def refresh(self) -> None:
        """Forgets the packed copy, so that the next call makes a new one.

        Needed after writes to single weights through a tensor's ``data`` or through numpy, which leave no trace: a call
        compares the first KiB of values, bias, scales and range only.
        """
        self._forget()

    def needs_grad(self, input: torch.Tensor) -> bool:
        """Whether a call with this input is recorded for a gradient."""
        return torch.is_grad_enabled() and (input.requires_grad or self.is_trained())

    def is_trained(self) -> bool:
        """Whether a parameter has a gradient."""
        bias, values = self._parameters["bias"], self._parameters.get("values")
        return (bias is not None and bias.requires_grad) or (values is not None and values.requires_grad)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[..., in_features] of float32, float16 or bfloat16 to [..., out_features].

        Raises:
            TypeError: no tensor.
            RuntimeError: a wrong shape, type or device; a static layer that has no range yet.
        """
        try:
            if not torch.compiler.is_compiling():
                # The same as below without what cannot apply.
                prepared = self._prepared
                if (
                    prepared is not None
                    and input.dim() == 2
                    and self.is_fresh(prepared)
                    and not self.needs_grad(input)
                    and forward_ad._current_level < 0
                ):
                    packs = prepared.value
                    many = input.shape[0] > crossover.FEW_ROWS
                    pack = packs.pack(many, input)
                    if pack is not None:
                        dense = packs.runs_dense[many]
                        chosen = selection.implementation("int8_chain" if dense else "sparse_packed", input)
                        if chosen is PACKED or chosen is DENSE:
                            run = RUN_DENSE if dense else RUN_PACKED
                            return run(input, pack, self.out_features, selection.dtype_argument(self.dtype))
                    elif isinstance(packs, Packs) and packs.runs_dense[many] and runs_packed(self.values):
                        return packs.run(input, self.operands(), self.dtype)
            return self.run(input, autocast_type(input, self.dtype))
        except AttributeError:  # found here, as it takes no time where the input is a tensor
            check_tensor(input)
            raise

    def run(self, input: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """:meth:`forward` with another type of the output."""
        needs_grad = self.needs_grad(input)
        if needs_grad and not self._trains and not torch.compiler.is_exporting():
            self._trains = self.is_trained()
        layer = self.operands()
        if torch.compiler.is_compiling():
            # Exported code is any machine's, and packs are this one's.
            if not needs_grad and self.values.device.type == "cpu" and not torch.compiler.is_exporting():
                return selection.implementation("sparse_layer", input)(input, *layer, dtype)
            return op.run_layer(input, layer, dtype)
        if is_traced() and not (self.training and self.is_trained()):
            return selection.implementation("sparse_layer", input)(input, *layer, dtype)
        if is_traced() or is_transformed():
            return op.transformed(input, layer, dtype)
        self._check_range()
        prepared: Callable[[torch.Tensor], torch.Tensor] | None = None
        structure = self._current_structure() if needs_grad else None
        trains = needs_grad and self.values.requires_grad
        if trains and self.training:
            # The values change with every step. Unless they are float32, the operator makes a new pack each time.
            if structure is not None and structure.packs(self.values):
                prepared = partial(structure.run, layer=layer, dtype=dtype)
        elif runs_packed(self.values):
            prepared = partial(self._current(Packs).run, layer=layer, dtype=dtype)
        elif not trains and input.dtype == self.values.dtype and semi_structured.serves(self.values):
            prepared = partial(self._current(semi_structured.Product), dtype=dtype)
        return op.run_layer(input, layer, dtype, prepared, structure)

    def _check_range(self) -> None:
        qparams = self.input_qparams
        # A check on a GPU would wait for the GPU: its kernels give NaN instead.
        if qparams is not None and qparams.device.type == "cpu" and not qparams[0] > 0:
            raise RuntimeError(
                "a static layer needs the range of its input: call quantize() with input_range=(low, high), "
                "or load a state_dict with input_qparams"
            )

    # ---- state ------------------------------------------------------------------------------------------------------

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing: Any,
        unexpected: Any,
        errors: Any,
    ) -> None:
        given = {name: state_dict.get(prefix + name) for name in (*self._buffers, *self._parameters)}
        found = {name: tensor for name, tensor in given.items() if isinstance(tensor, torch.Tensor)}
        owns = {name: getattr(self, name) for name in given}
        wrong = state.wrong_state(found, owns, self.out_features, self.in_features, self.pattern)
        errors.extend(f"{prefix}{reason} in the state_dict" for reason in wrong)
        if wrong:
            return
        for name in (*_STRUCTURE, "weight_scale"):
            own, new = getattr(self, name), found.get(name)
            if own is not None and new is not None and new.shape != own.shape:
                # The parameter stays the one that an optimizer knows; its gradient is of other weights.
                own.data = torch.empty(new.shape, dtype=own.dtype, device=own.device)
                own.grad = None
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)
        if self.activation is None:
            self.dtype = self.values.dtype  # assigned, not copied
        elif self.bias is not None and self.bias.dtype != torch.float32:
            self.bias = torch.nn.Parameter(self.bias.detach().float(), self.bias.requires_grad)
        self._forget()

    def _apply(self, fn: Any, recurse: bool = True) -> SparseLinear:
        if self.activation is not None:
            super()._apply(fn, recurse)
        else:
            if fn(torch.empty(0, dtype=self.dtype)).dtype not in FLOATS:
                raise ValueError(
                    "a sparse layer has float32, float16 or bfloat16 weights, but would get "
                    f"{fn(torch.empty(0, dtype=self.dtype)).dtype}"
                )
            torch.nn.Module._apply(self, fn, recurse)
            self.dtype = self.values.dtype
        self._forget()
        return self

    def __getstate__(self) -> dict[str, Any]:
        # Copies and files hold the canonical state only.
        gone = dict.fromkeys(("_prepared", "_structure"))
        return {**self.__dict__, **gone}
