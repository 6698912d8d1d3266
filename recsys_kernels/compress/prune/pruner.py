"""Pruning step by step while a model trains."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Protocol

import torch

from ...ops.linear.sparse.patterns import check_sparsity, parse_pattern
from .layers import Choice, PrunedLayer, PruneReport, Target, find_layers
from .masks import (
    SCORES,
    check_finite,
    check_scope,
    choose_masks,
    gradient_scores,
    remove_masks,
    scores_of,
    shape_of,
    shares_of,
)


class Schedule(Protocol):
    """When masks move, and how sparse they are then. Steps count calls of :meth:`Pruner.step`, from 1; 0 is the start.

    Attributes:
        end: the last step at which masks move.
    """

    @property
    def end(self) -> int: ...

    def moves(self, step: int) -> bool:
        """Whether masks are chosen anew at a step."""

    def sparsity(self, step: int, target: float) -> float:
        """The sparsity at a step of a layer that ends with ``target``."""


@dataclass(frozen=True)
class CubicSchedule:
    """Sparsity that grows fast at first and slowly in the end (Zhu and Gupta, "To Prune, or Not to Prune", 2017).

    At step t it is target + (initial - target) * (1 - (t - begin) / (end - begin))^3; masks move at ``begin``, every
    ``every`` steps after it, and at ``end``.

    Attributes:
        begin, end: first and last step at which masks move, counted in calls of :meth:`Pruner.step`; begin < end.
        every: steps from one move to the next, at least 1.
        initial: sparsity at ``begin``, 0 <= initial < 1. Default: the share of zeros that a layer has at ``begin``
            (with ``scope="global"`` all layers together), but no more than the target: 0 for most models, and one that
            is pruned already goes on from there. A layer of nothing but zeros counts as not pruned.

    Raises:
        ValueError, TypeError: numbers that are no schedule.
    """

    begin: int
    end: int
    every: int = 1
    initial: float | None = None

    def __post_init__(self) -> None:
        for name in ("begin", "end", "every"):
            steps = _check_step(name, getattr(self, name), 1 if name == "every" else 0)
            object.__setattr__(self, name, steps)
        if self.end <= self.begin:
            raise ValueError(f"end must be after begin, but begin is {self.begin} and end {self.end}")
        if self.initial is not None:
            share = check_sparsity(self.initial, parse_pattern("unstructured"), "initial")
            object.__setattr__(self, "initial", share)

    def moves(self, step: int) -> bool:
        return self.begin <= step <= self.end and ((step - self.begin) % self.every == 0 or step == self.end)

    def sparsity(self, step: int, target: float, start: float = 0.0) -> float:
        """The sparsity at a step of a layer that ends with ``target``, and begins with ``start`` if initial is None."""
        if step < self.begin:
            return 0.0
        left = 1.0 - (step - self.begin) / (self.end - self.begin) if step < self.end else 0.0
        return target + ((start if self.initial is None else self.initial) - target) * left**3


@dataclass(frozen=True)
class OneShot:
    """A schedule that prunes once, at a single step.

    Attributes:
        at: the step, counted in calls of :meth:`Pruner.step`; 0 is when the Pruner is made.

    Raises:
        ValueError, TypeError: not a step.
    """

    at: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "at", _check_step("at", self.at, 0))

    @property
    def end(self) -> int:
        return self.at

    def moves(self, step: int) -> bool:
        return step == self.at

    def sparsity(self, step: int, target: float) -> float:
        return target if step >= self.at else 0.0


def _check_step(name: str, value: Any, least: int) -> int:
    try:
        steps = operator.index(value)
    except TypeError:
        steps = None
    if steps is None or isinstance(value, bool):
        raise TypeError(f"{name} must be a number of steps (int), but is {value!r}")
    if steps < least:
        raise ValueError(f"{name} must be at least {least}, but is {steps}")
    return steps


class Pruner:
    """Prunes a model's linear layers while it trains, with any optimizer.

    Making it puts a mask on each layer that has none (see :func:`~recsys_kernels.prune`, whose arguments these are),
    which keeps everything at first; :meth:`step` moves the masks. A mask holds dropped weights at exactly zero and
    gives them no gradient. Momentum and weight decay of the values behind it have no effect until a weight
    comes back, which it does when its score gets higher than that of one that is kept.

    With ``scores="movement"`` or ``"first_order"`` every step adds to the scores, from the start to the schedule's
    end: -w * gradient or |w * gradient|, with the weight after the optimizer's step and the gradient in ``.grad``
    (summed over processes by DistributedDataParallel, unscaled by a GradScaler's step; entries that are not finite
    count 0, as the optimizer skips such a step). The score of a weight that is dropped stays as it is: there is no
    gradient. A layer that has had no gradient at all (frozen, or not used) has no score, and is not pruned by one: that
    is an error when it is to lose weights.

    Example:
        >>> pruner = rk.Pruner(model, 0.9, schedule=rk.CubicSchedule(begin=100, end=900, every=20))  # doctest: +SKIP
        >>> for x, y in loader:                                                    # doctest: +SKIP
        ...     optimizer.zero_grad()
        ...     loss(model(x), y).backward()
        ...     optimizer.step()
        ...     pruner.step()
        >>> pruner.finish()                                                        # doctest: +SKIP

    DistributedDataParallel may be put around the model before or after this. Every process needs a Pruner; they choose
    the same masks, as weights and gradients are the same. For averaged models see
    :class:`~recsys_kernels.compress.prune.layers.PruningMask`.

    To resume: make model, optimizer and Pruner as before, then load the ``state_dict`` of each. The model's has the
    masks.

    Args:
        model: any model with ``torch.nn.Linear`` layers; it is changed in place.
        sparsity, pattern, scope, layers, amounts: see :func:`~recsys_kernels.prune`.
        schedule: when and how far: :class:`~recsys_kernels.CubicSchedule`, :class:`~recsys_kernels.OneShot`, or an
            object with the same methods.
        scores: ``"magnitude"``, ``"movement"`` or ``"first_order"``.

    Attributes:
        model: the model.
        steps: the number of calls of :meth:`step`.

    Raises:
        ValueError: as :func:`~recsys_kernels.prune`; a schedule that does not go with the pattern, the sparsity or the
            scores.
        TypeError: an argument of another type.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        sparsity: float | None = None,
        pattern: str = "unstructured",
        *,
        schedule: Schedule,
        scores: str = "magnitude",
        scope: str = "layer",
        layers: Choice | Iterable[Choice] | None = None,
        amounts: Mapping[str, float] | None = None,
    ) -> None:
        self.model, self.steps = model, 0
        self._pattern = parse_pattern(pattern)
        check_scope(scope, self._pattern)
        if scores not in SCORES:
            raise ValueError(f"scores must be one of {', '.join(map(repr, SCORES))}, but is {scores!r}")
        self._schedule, self._kind, self._scope = schedule, scores, scope
        found = find_layers(model, layers)
        self._shares = shares_of(found, sparsity, self._pattern, amounts)
        self._own = frozenset(amounts or ())
        self._targets = [target for target in found if target.name in self._shares]
        self._left = [target for target in found if target.name not in self._shares]
        self._check_schedule()
        self._before = {target.name: target.zeros for target in self._targets}
        # Sums by the name of a layer, None before its first gradient.
        self._scores: dict[str, torch.Tensor | None] = {}
        if scores != "magnitude":
            self._scores = dict.fromkeys([target.name for target in self._targets])
        self._start: dict[str, float] = {}  # the sparsity at the start, known once masks have moved
        self._end: float | None = None  # the sparsity at the end, known after finish()
        if schedule.moves(0):
            self._move()
        for target in self._targets:
            if target.mask is None:
                target.put_mask(torch.ones_like(target.parameter, dtype=torch.bool))

    def _check_schedule(self) -> None:
        schedule = self._schedule
        if not all(hasattr(schedule, name) for name in ("end", "moves", "sparsity")):
            raise TypeError(f"schedule must be a CubicSchedule, a OneShot or the like, but is {schedule!r}")
        if (
            self._kind != "magnitude"
            and schedule.moves(0)
            and any(schedule.sparsity(0, s) for s in self._target_shares)
        ):
            raise ValueError(
                f"schedule prunes at step 0, when there are no gradients yet for scores={self._kind!r}: begin later"
            )
        if isinstance(schedule, CubicSchedule):
            if self._pattern.of:
                raise ValueError(
                    f"schedule must be a OneShot with the pattern {self._pattern.name!r}, which has one sparsity"
                )
            least = min(self._target_shares)
            if schedule.initial is not None and schedule.initial > least:
                raise ValueError(
                    f"initial of the schedule is {schedule.initial}, above the sparsity {least} at its end"
                )

    @property
    def _target_shares(self) -> list[float]:
        return [share for share in self._shares.values() if share] or [0.0]

    @property
    def sparsity(self) -> float:
        """The share of the weights of all pruned layers that are masked now."""
        if self._end is not None:
            return self._end
        masks = [target.mask for target in self._targets]
        kept = sum(int(torch.count_nonzero(mask)) for mask in masks if mask is not None)
        return 1.0 - kept / sum(target.parameter.numel() for target in self._targets)

    def step(self) -> bool:
        """Advances the schedule. Call it after every step of the optimizer, before ``zero_grad``.

        Returns:
            Whether the masks were chosen anew.

        Raises:
            ValueError: NaN or infinity in a weight when masks move; the layer is named.
            RuntimeError: scores that need gradients, but no layer has one, or one that is to lose weights never had
                one; :meth:`finish` was called.
        """
        if self._end is not None:
            raise RuntimeError("step() after finish(): the masks are gone")
        if self._scores and self.steps < self._schedule.end:
            self._add_scores()
        self.steps += 1
        moves = self._schedule.moves(self.steps)
        if moves:
            self._move()
        return moves

    @torch.no_grad()
    def _add_scores(self) -> None:
        seen = False
        for target in self._targets:
            gradient = target.parameter.grad
            if gradient is not None:
                seen = True
                weight = target.parameter.detach()
                weight = weight if weight.dtype == torch.float64 else weight.float()
                new = gradient_scores(self._kind, weight, gradient).nan_to_num_(0.0, 0.0, 0.0)
                before = self._scores[target.name]
                # The model may have moved to another device.
                self._scores[target.name] = new if before is None else before.to(new.device).add_(new)
        if not seen:
            raise RuntimeError(f"no layer has a gradient for scores={self._kind!r}: call step() before zero_grad()")

    def _move(self) -> None:
        values = {target.name: scores_of(target, "magnitude") for target in self._targets}
        start = self._start or self._present()
        shares = {name: self._share(share, start[name]) for name, share in self._shares.items()}
        for name, share in shares.items():
            if share:
                check_sparsity(share, self._pattern, f"the schedule's sparsity at step {self.steps} for {name!r}")
        masks = choose_masks(self._ranked(values, shares), shares, self._pattern, self._scope, self._own)
        self._start = start
        for target in self._targets:
            target.put_mask(masks[target.name])

    def _share(self, target: float, start: float) -> float:
        """The sparsity of a layer now; the schedule does not apply to a layer that stays dense."""
        if not target:
            return 0.0
        if isinstance(self._schedule, CubicSchedule):
            return self._schedule.sparsity(self.steps, target, start)
        return self._schedule.sparsity(self.steps, target)

    def _present(self) -> dict[str, float]:
        """The share of zeros of each layer, or of those that have one threshold, but no more than its target."""
        zeros = {target.name: target.zeros for target in self._targets}
        # Some layers start to learn from zeros only: nobody has pruned these layers.
        zeros = {name: share if share < 1.0 else 0.0 for name, share in zeros.items()}
        if self._scope == "global":
            sizes = {t.name: t.parameter.numel() for t in self._targets if t.name not in self._own}
            total = sum(zeros[name] * size for name, size in sizes.items())
            zeros.update(dict.fromkeys(sizes, total / (sum(sizes.values()) or 1)))
        return {name: min(share, self._shares[name]) for name, share in zeros.items()}

    def _ranked(self, values: Mapping[str, torch.Tensor], shares: Mapping[str, float]) -> dict[str, torch.Tensor]:
        """The scores to choose by: the magnitudes that are given, or the sums of the steps."""
        if self._kind == "magnitude":
            return dict(values)
        if self.steps == 0:
            # There are no gradients yet, and the only weights to drop are zero already.
            return {t.name: values[t.name] if t.mask is None else values[t.name] * t.mask for t in self._targets}
        ranked = {}
        for name, found in self._scores.items():
            if found is not None:
                check_finite(found, f"the score of {name!r}")
            elif shares[name]:
                raise RuntimeError(
                    f"{name!r} has had no gradient until step {self.steps}, so that there is no score={self._kind!r} "
                    "for it: check its requires_grad and that the loss depends on it, let the schedule begin later, "
                    "or leave it out of layers"
                )
            ranked[name] = values[name] if found is None else found
        return ranked

    def finish(self) -> PruneReport:
        """Takes the masks off. Plain layers remain, with the parameters that they had and zeros for dropped weights.

        Such a model is what ``SparseLinear.from_dense(linear, sparsity=None)`` packs. Nothing holds the zeros any more:
        one more step of an optimizer moves them (momentum and Adam's averages do so by themselves, without a gradient).
        So call it after the last step; to train on, keep the masks, which stay without this call. With
        DistributedDataParallel, see :func:`~recsys_kernels.remove_masks`.

        Returns:
            Sparsity of each layer when the Pruner was made and now.

        Warns:
            UserWarning: the schedule has not ended, and there are fewer zeros than asked for.

        Raises:
            RuntimeError: called before.
        """
        if self._end is not None:
            raise RuntimeError("finish() was called before")
        self._end = self.sparsity
        if self.steps < self._schedule.end:
            self._warn_of_less(self._end)
        for target in self._targets:
            remove_masks(target.module)
        layers = [PrunedLayer(t.name, shape_of(t), self._before[t.name], t.zeros) for t in self._targets]
        layers += [PrunedLayer(t.name, shape_of(t), t.zeros, t.zeros, t.reason or "not in amounts") for t in self._left]
        order = {name: number for number, (name, _) in enumerate(self.model.named_modules())}
        return PruneReport(tuple(sorted(layers, key=lambda layer: order[layer.name])), self._pattern.name)

    def _warn_of_less(self, now: float) -> None:
        sizes = {target.name: target.parameter.numel() for target in self._targets}
        asked = sum(self._shares[name] * size for name, size in sizes.items()) / sum(sizes.values())
        if f"{now:.1%}" != f"{asked:.1%}" and now < asked:
            warnings.warn(
                f"finish() at step {self.steps} of {self._schedule.end}: {now:.1%} of the weights are dropped, not the "
                f"{asked:.1%} that were asked for",
                UserWarning,
                stacklevel=3,
            )

    def state_dict(self) -> dict[str, Any]:
        """Steps, scores and settings, for ``torch.save``; like an optimizer's, it refers to tensors that change."""
        settings = {
            "pattern": self._pattern.name,
            "scores": self._kind,
            "scope": self._scope,
            "layers": [target.name for target in self._targets],
            "sparsity": dict(self._shares),
            "amounts": sorted(self._own),
            "schedule": _described(self._schedule),
        }
        return {"steps": self.steps, "scores": dict(self._scores), "start": dict(self._start), "settings": settings}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continues from the state of another Pruner of the same model; the masks come with the model's ``state_dict``.

        Raises:
            ValueError: not a state of a Pruner with these arguments (what differs is named), or one whose values are of
                another type or shape, or not finite. Nothing is changed then.
        """
        wanted = self.state_dict()
        if not isinstance(state_dict, Mapping) or state_dict.keys() != wanted.keys():
            raise ValueError(f"state_dict must have {', '.join(wanted)}, as Pruner.state_dict() gives them")
        for name, value in wanted["settings"].items():
            given = _mapping(state_dict, "settings")
            if name not in given:
                raise ValueError(f"state_dict['settings'] has no setting {name}")
            if type(given[name]) is not type(value) or given[name] != value:
                raise ValueError(f"state_dict is of a Pruner with {name}={given[name]!r}, but this one has {value!r}")
        try:
            steps = _check_step("state_dict['steps']", state_dict["steps"], 0)
            start = _mapping(state_dict, "start", self._shares, empty=True)
            start = {
                name: check_sparsity(start[name], parse_pattern("unstructured"), f"state_dict['start'][{name!r}]")
                for name in start and self._shares
            }
        except TypeError as error:
            raise ValueError(str(error)) from None
        scores = _mapping(state_dict, "scores", self._scores)
        loaded = {t.name: _loaded(t, scores[t.name]) for t in self._targets if t.name in scores}
        self.steps, self._start, self._scores = steps, start, loaded

    def __repr__(self) -> str:
        layers = f"{len(self._targets)} layer{'s' if len(self._targets) > 1 else ''}"
        now = f"steps={self.steps}, sparsity={self.sparsity:.4f}"
        return f"Pruner({layers}, {self._pattern.name}, {self._schedule}, {now})"


# ---- what is saved -------------------------------------------------------------------------------------------------


def _described(schedule: Schedule) -> dict[str, Any]:
    """Plain values by which two schedules differ."""
    found: dict[str, Any] = {"type": type(schedule).__name__, "end": int(schedule.end)}
    if is_dataclass(schedule):
        values = {field.name: getattr(schedule, field.name) for field in fields(schedule)}
        found.update((n, v) for n, v in values.items() if v is None or isinstance(v, (bool, int, float, str)))
    return found


def _mapping(
    state_dict: Mapping[str, Any], part: str, names: Iterable[str] | None = None, *, empty: bool = False
) -> Mapping[str, Any]:
    """Checks a part of a state, which must have one entry for each of the names."""
    given = state_dict[part]
    if not isinstance(given, Mapping):
        raise ValueError(f"state_dict[{part!r}] must be a dict, but is {given!r:.80}")
    if names is not None and given.keys() != set(names) and not (empty and not given):
        listed = [", ".join(map(repr, sorted(keys, key=str))) or "nothing" for keys in (names, given)]
        raise ValueError(f"state_dict[{part!r}] must have {listed[0]}, but has {listed[1]}")
    return given


def _loaded(target: Target, found: Any) -> torch.Tensor | None:
    """A copy of the score of a layer, where its weight is."""
    if found is None:
        return None
    what, shape = f"the score of {target.name!r} in state_dict", tuple(target.parameter.shape)
    kind = type(found).__name__
    if isinstance(found, torch.Tensor):
        kind = f"{str(found.dtype).removeprefix('torch.')} {tuple(found.shape)}"
    if not isinstance(found, torch.Tensor) or not found.is_floating_point() or found.shape != shape:
        raise ValueError(f"{what} must be a float tensor {shape}, but is {kind}")
    check_finite(found, what)
    dtype = torch.float64 if target.parameter.dtype == torch.float64 else torch.float32
    return found.detach().to(target.parameter.device, dtype, copy=True)
