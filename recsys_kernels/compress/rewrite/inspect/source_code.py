"""Reads of a layer's ``weight`` by other code than the layer, found in the source code of a model.

A layer whose weight is read from outside (``scores = user @ self.items.weight.T``) cannot be swapped for one that
stores it in another form: at best the reader fails, at worst ``x + self.positions.weight`` adds integers to floats.
"""

from __future__ import annotations

import ast
import builtins
import inspect
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from types import ModuleType
from typing import Any, NamedTuple

import torch

_EACH = "[]"  # a step of a path: every item of a container
_Path = tuple[str, ...]
# Attributes of a weight that read no values: they mean the same whatever form the weight has.
HARMLESS = frozenset({"device"})
# Every module has these attributes: asking for them takes nothing out of a container.
_OF_EVERY_MODULE = frozenset({"training", "train", "eval", "forward", "to", "requires_grad_", "zero_grad"})


@dataclass
class SourceReads:
    """The reads that the source of some modules shows.

    Attributes:
        places: id of a layer -> where its weight is read.
        training: id of a layer -> where its weight is read in a branch that only training takes.
        taken_apart: id of a container -> where something else is done with it than to call it.
        unknown: names of methods whose source is not available.
        maybe: id of a layer -> code that may read its weight, by an expression that the source does not resolve.
    """

    places: dict[int, str] = field(default_factory=dict)
    training: dict[int, str] = field(default_factory=dict)
    taken_apart: dict[int, str] = field(default_factory=dict)
    unknown: set[str] = field(default_factory=set)
    maybe: dict[int, str] = field(default_factory=dict)


def find_weight_reads(
    modules: Collection[torch.nn.Module],
    layers: Collection[torch.nn.Module],
    containers: Collection[torch.nn.Module] = (),
) -> SourceReads:
    """Reads of ``<path from self>.weight`` in the methods of ``modules``.

    Paths are followed through attributes, items of containers and local names that stand for them. Where the owner
    of a ``.weight`` cannot be told, it may be any layer in the module; so may what is handed to a function that reads
    weights or has no source. Methods that only constructors use (initialization) do not count.

    Args:
        modules: all modules of a model.
        layers: those whose readers are asked for; their own methods do not count.
        containers: Sequentials of which is asked whether they are only called.
    """
    wanted = _Wanted({id(layer) for layer in layers}, {id(container) for container in containers})
    readers = [m for m in modules if id(m) not in wanted.layers and _is_own(type(m))]
    reads = SourceReads()
    done = _follow(readers, "forward", wanted, reads) | _follow(readers, "__init__", wanted, SourceReads())
    for module in readers:
        for function in _methods(module):
            if (id(module), function) not in done:
                _scan(module, function, wanted, reads)
    return reads


class _Wanted(NamedTuple):
    """Ids of the modules that are asked for."""

    layers: set[int]
    containers: set[int]


def _follow(
    modules: Collection[torch.nn.Module], name: str, wanted: _Wanted, reads: SourceReads
) -> set[tuple[int, Any]]:
    """Scans a method of every module and the methods that it uses; returns what it has scanned."""
    queue = [(module, function) for module in modules for function in _named(module, name)]
    seen: set[tuple[int, Any]] = set()
    while queue:
        module, function = queue.pop()
        if (id(module), function) not in seen:
            seen.add((id(module), function))
            queue += _scan(module, function, wanted, reads)
    return seen


def _scan(module: torch.nn.Module, function: Any, wanted: _Wanted, reads: SourceReads) -> list[tuple[Any, Any]]:
    """Notes the reads in one method; returns the methods that it uses, as (module, function)."""
    code = _read_source(function)
    if code is None:
        reads.unknown.add(function.__qualname__)
        return []
    used = []
    for owner, name in code.attributes:
        used += [
            (target, method)
            for target in _resolve(module, owner)
            if isinstance(target, torch.nn.Module)
            for method in _named(target, name)
        ]
    file = os.path.basename(function.__code__.co_filename)
    for path, line, in_training in code.weights:
        for target in _resolve(module, path):
            if id(target) in wanted.layers:
                (reads.training if in_training else reads.places).setdefault(
                    id(target), f"{function.__qualname__} ({file}:{line})"
                )
    if lines := [*code.vague, *(line for path, line, _ in code.weights if _is_lost(module, path))]:
        for target in module.modules():
            if id(target) in wanted.layers:
                reads.maybe.setdefault(id(target), f"{function.__qualname__} ({file}:{min(lines)})")
    for callee, path, line in code.passed:
        handed = [layer for value in _resolve(module, path) for layer in _layers_in(value, wanted.layers)]
        if handed and _may_read(module, function, callee):
            for layer in handed:
                reads.maybe.setdefault(layer, f"{function.__qualname__} ({file}:{line})")
    for path, line in code.mentions if wanted.containers else ():
        for target in _resolve(module, path):
            if id(target) in wanted.containers:
                reads.taken_apart.setdefault(id(target), f"{function.__qualname__} ({file}:{line})")
    return used


def _named(module: torch.nn.Module, name: str) -> list[Any]:
    """The functions behind a method or property name, with those of base classes that ``super()`` may reach."""
    classes = [c for c in type(module).__mro__ if name in vars(c)]
    return [f for c in classes if _is_own(c) and (f := _function(vars(c)[name])) is not None]


def _methods(module: torch.nn.Module) -> list[Any]:
    classes = [c for c in type(module).__mro__ if _is_own(c)]
    return [f for c in classes for value in vars(c).values() if (f := _function(value)) is not None]


def _is_own(cls: type) -> bool:
    """Whether a class may hold code that knows the model: scripted modules have none, torch.nn knows no model."""
    return issubclass(cls, torch.nn.Module) and not cls.__module__.startswith(("torch.nn.", "torch.jit."))


def _function(value: Any) -> Any:
    value = value.fget if isinstance(value, property) else value
    if isinstance(value, (staticmethod, classmethod)) or not callable(value):
        return None
    value = inspect.unwrap(value)
    return value if inspect.isfunction(value) else None


def _resolve(module: torch.nn.Module, path: _Path) -> list[Any]:
    """The objects that a path of attributes from a module leads to; runs no code of the model."""
    objects: list[Any] = [module]
    for step in path:
        objects = [found for value in objects for found in _step(value, step)]
    return objects


def _step(value: Any, name: str) -> list[Any]:
    if isinstance(value, torch.nn.Module):
        children = dict(value._modules.items())  # a scripted module has no true dict
        if name == _EACH:
            return list(children.values())
        found = children.get(name, vars(value).get(name))
        return [] if found is None else [found]
    if name == _EACH and isinstance(value, (list, tuple)):
        return list(value)
    if name == _EACH and isinstance(value, Mapping):
        return list(value.values())
    return []


def _is_lost(module: torch.nn.Module, path: _Path) -> bool:
    """Whether a path leads through a property or method, whose result the source does not tell."""
    for end, name in enumerate(path):
        for value in _resolve(module, path[:end]):
            if not isinstance(value, torch.nn.Module) or isinstance(value, torch.nn.ModuleDict):
                continue
            if name not in value._modules and name not in vars(value) and hasattr(type(value), name):
                return True
    return False


def _layers_in(value: Any, layers: Collection[int]) -> list[int]:
    """Ids of the layers that a value is or, as a container, holds."""
    if id(value) in layers:
        return [id(value)]
    if isinstance(value, (torch.nn.ModuleList, torch.nn.ModuleDict, Mapping, list, tuple)):
        return [layer for item in _step(value, _EACH) for layer in _layers_in(item, layers)]
    return []


def _may_read(module: torch.nn.Module, function: Any, callee: ast.expr) -> bool:
    """Whether what a method calls may read weights of its arguments; the module's own methods are scanned anyway."""
    names = function.__code__.co_varnames[:1]
    if isinstance(callee, ast.Attribute) and isinstance(callee.value, ast.Name) and callee.value.id in names:
        child = module._modules.get(callee.attr)
        if child is None:
            return not hasattr(type(module), callee.attr)
        return _is_own(type(child)) and any(_reads_weights(f, set()) for f in _named(child, "forward"))
    return _reads_weights(_global(function, callee), set())


def _global(function: Any, node: ast.expr) -> Any:
    """The value of a name, or of a name in a Python module, outside of a function; None if it is unknown."""
    if isinstance(node, ast.Name):
        return function.__globals__.get(node.id, getattr(builtins, node.id, None))
    if isinstance(node, ast.Attribute):
        owner = _global(function, node.value)
        return getattr(owner, node.attr, None) if isinstance(owner, ModuleType) else None
    return None


def _reads_weights(value: Any, seen: set[Any]) -> bool:
    """Whether a function, or one that it calls, mentions a weight; True where that cannot be told."""
    if getattr(value, "__module__", "").partition(".")[0] in ("torch", "builtins", "itertools", "collections"):
        return False
    value = inspect.unwrap(value) if callable(value) else value
    if not inspect.isfunction(value):
        return True
    if value in seen:
        return False
    seen.add(value)
    code = _read_source(value)
    if code is None or code.vague or code.weights:
        return True
    # Only functions of its own module or of imported modules count, not methods of its arguments.
    called = [_global(value, callee) for callee in code.called]
    return any(_reads_weights(other, seen) for other in called if inspect.isfunction(other))


@dataclass(frozen=True)
class _Source:
    """The contents of a method's source: attributes as (path of the owner, name); as (path, line) reads of weights, and
    mentions of something where it is neither called nor given a name; lines with reads of weights of an unknown owner;
    as (function, path, line) what is handed to functions; the functions that are called."""

    attributes: tuple[tuple[_Path, str], ...] = ()
    weights: tuple[tuple[_Path, int, bool], ...] = ()
    mentions: tuple[tuple[_Path, int], ...] = ()
    vague: tuple[int, ...] = ()
    passed: tuple[tuple[ast.expr, _Path, int], ...] = ()
    called: tuple[ast.expr, ...] = ()


@lru_cache(maxsize=4096)
def _read_source(function: Any) -> _Source | None:
    try:
        lines, first = inspect.getsourcelines(function)
        # In a block instead of dedented: comments may stand further left than the method.
        opening = "if True:\n" if lines[0][:1].isspace() else "\n"
        tree = ast.parse(opening + "".join(lines))
    except (OSError, TypeError, SyntaxError):
        return None
    names = function.__code__.co_varnames[: function.__code__.co_argcount]
    paths = _Paths(names[0] if names else "", function.__qualname__.rpartition(".")[0].rpartition(".")[2])
    nodes = list(ast.walk(tree))
    for _ in range(2):  # a local name may stand for another
        for node in nodes:
            paths.learn(node)
    harmless = {id(n.value) for n in nodes if isinstance(n, ast.Attribute) and n.attr in HARMLESS}
    named = _called_or_named(nodes)
    training = {id(inner) for node in nodes for inner in _training_branch(node, paths)}
    attributes, weights, mentions = [], [], []
    for node in nodes:
        mentioned = isinstance(node, (ast.Attribute, ast.Subscript, ast.Name)) and isinstance(node.ctx, ast.Load)
        if mentioned and id(node) not in named and (path := paths.of(node)):
            assert isinstance(node, ast.expr)
            mentions.append((path, first + node.lineno - 2))
        if isinstance(node, (ast.Attribute, ast.Call)) and (path := paths.of(node)):
            if isinstance(node, ast.Attribute):
                attributes.append((path[:-1], path[-1]))
            if path[-1] == "weight" and id(node) not in harmless:
                weights.append((path[:-1], first + node.lineno - 2, id(node) in training))
    weights.sort(key=lambda read: read[1])
    calls = [node for node in nodes if isinstance(node, ast.Call)]
    of_weights = [node for node in nodes if isinstance(node, ast.expr) and _is_weight(node)]
    return _Source(
        tuple(attributes),
        tuple(weights),
        tuple(mentions),
        tuple(first + n.lineno - 2 for n in of_weights if id(n) not in harmless and not paths.of(n)),
        tuple((call.func, path, first + call.lineno - 2) for call in calls for path in _arguments(call, paths)),
        tuple(call.func for call in calls),
    )


def _training_branch(node: ast.AST, paths: _Paths) -> Iterator[ast.AST]:
    """The nodes of a branch that only training takes: ``if self.training:``, or the ``else`` of its opposite."""
    if isinstance(node, (ast.If, ast.IfExp)):
        test, taken = node.test, node.body
        if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
            test, taken = test.operand, node.orelse
        if isinstance(test, ast.Attribute) and paths.of(test) == ("training",):
            for statement in taken if isinstance(taken, list) else [taken]:
                yield from ast.walk(statement)


def _is_weight(node: ast.AST) -> bool:
    """``x.weight`` or ``getattr(x, "weight")``."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "getattr":
        return len(node.args) > 1 and isinstance(node.args[1], ast.Constant) and node.args[1].value == "weight"
    return isinstance(node, ast.Attribute) and node.attr == "weight" and isinstance(node.ctx, ast.Load)


def _arguments(call: ast.Call, paths: _Paths) -> Iterator[_Path]:
    values = [*call.args, *(keyword.value for keyword in call.keywords)]
    while values:
        value = values.pop()
        if isinstance(value, (ast.List, ast.Tuple)):
            values += value.elts
        elif isinstance(value, ast.Dict):
            values += value.values
        elif isinstance(value, ast.Starred):
            values.append(value.value)
        elif path := paths.of(value):
            yield path


def _called_or_named(nodes: Sequence[ast.AST]) -> set[int]:
    """Ids of expressions that are called, get a local name, or are asked for what every module has."""
    found = {id(node.func) for node in nodes if isinstance(node, ast.Call)}
    found |= {id(n.value) for n in nodes if isinstance(n, ast.Assign) and isinstance(n.targets[0], ast.Name)}
    return found | {id(n.value) for n in nodes if isinstance(n, ast.Attribute) and n.attr in _OF_EVERY_MODULE}


class _Paths:
    """Expressions of one function as paths from ``self``."""

    def __init__(self, self_name: str, class_name: str) -> None:
        self._known: dict[str, _Path] = {self_name: ()}
        self._private = f"_{class_name.lstrip('_')}"

    def of(self, node: ast.AST) -> _Path | None:
        if isinstance(node, ast.Name):
            return self._known.get(node.id)
        if isinstance(node, ast.Attribute):
            mangled = node.attr.startswith("__") and not node.attr.endswith("__")
            return self._then(node.value, self._private + node.attr if mangled else node.attr)
        if isinstance(node, ast.Subscript):
            return self._then(node.value, _EACH)
        if isinstance(node, ast.Call):
            return self._call(node)
        return None

    def learn(self, node: ast.AST) -> None:
        """Takes down a local name that stands for a path: ``table = self.table``, ``for table in self.tables``."""
        if isinstance(node, ast.Assign) and len(node.targets) == 1:
            self._bind(node.targets[0], self.of(node.value))
        elif isinstance(node, (ast.For, ast.comprehension)):
            path = self.of(node.iter)
            # (key, item) and (number, item): the item comes last.
            target = node.target.elts[-1] if isinstance(node.target, ast.Tuple) else node.target
            self._bind(target, None if path is None else (*path, _EACH))
        elif isinstance(node, ast.Call) and len(node.args) == 2 and isinstance(node.args[0], ast.Lambda):
            path, own = self.of(node.args[1]), node.args[0].args.args
            if isinstance(node.func, ast.Name) and node.func.id in ("map", "filter") and path and len(own) == 1:
                self._known[own[0].arg] = (*path, _EACH)

    def _bind(self, target: ast.AST, path: _Path | None) -> None:
        if isinstance(target, ast.Name) and path:
            self._known[target.id] = path

    def _then(self, owner: ast.AST, step: str) -> _Path | None:
        path = self.of(owner)
        return None if path is None else (*path, step)

    def _call(self, node: ast.Call) -> _Path | None:
        if isinstance(node.func, ast.Attribute) and node.func.attr in ("values", "items"):
            return self.of(node.func.value)
        if isinstance(node.func, ast.Attribute) and node.func.attr == "get_submodule" and len(node.args) == 1:
            name, path = node.args[0], self.of(node.func.value)
            if isinstance(name, ast.Constant) and isinstance(name.value, str) and path is not None:
                return (*path, *name.value.split("."))
        if isinstance(node.func, ast.Name) and node.args:
            if node.func.id in ("enumerate", "list", "reversed"):
                return self.of(node.args[0])
            second = node.args[1] if len(node.args) > 1 else None
            if node.func.id == "getattr" and isinstance(second, ast.Constant) and isinstance(second.value, str):
                return self._then(node.args[0], second.value)
        return None
