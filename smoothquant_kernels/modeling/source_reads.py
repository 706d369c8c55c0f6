"""Finds other code that reads a layer's weight in the source of the model's classes, without running the model.

A run shows only the reads on the paths that it takes. For other paths, and for a model that cannot be run, only the
source remains: `forward` of every class, and the methods and functions that it calls. Names are followed through
attributes of `self`, assignments, loops and arguments. Reading `weight.dtype` and the like does not count, because it
does not use the numbers. Constructors and initializers do not count either.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import nn

#: Attributes of a weight that reveal nothing about its numbers.
_HARMLESS = frozenset(
    "dtype device shape size dim ndim numel requires_grad is_cuda is_meta layout element_size grad".split()
)
_READ = frozenset({"weight", "bias"})
_ANY_CHILD = "*"
_DEPTH = 6  # the deepest chain of calls that is followed
Path = tuple[str, ...]  # attributes from the module down to a layer
_Env = Mapping[str, frozenset[Path]]
_NOTHING: frozenset[Path] = frozenset()


def read_in_source(model: nn.Module) -> Iterator[tuple[nn.Module, nn.Module]]:
    """Yields (reader, layer): a module whose `forward` may read the parameters of a layer below it."""
    for module in model.modules():
        for path in _reads_of(type(module)):  # type: ignore[arg-type]
            for layer in _resolve(module, path):
                yield module, layer


def _resolve(module: nn.Module, path: Path) -> Iterator[nn.Module]:
    if not path:
        yield module
        return
    if path[0] == _ANY_CHILD:
        children = list(module.children())
    else:
        child = module._modules.get(path[0])
        children = [] if child is None else [child]
    for child in children:
        yield from _resolve(child, path[1:])


@functools.cache
def _reads_of(cls: type) -> frozenset[Path]:
    """Paths from a module of this class to the layers whose weight or bias its `forward` may read."""
    forward = inspect.getattr_static(cls, "forward", None)
    reader = _Reader(cls)
    if forward is not None and cls.__module__ != "torch.nn.modules.module":
        reader.follow(forward, [frozenset({()})], {}, 0)
    # an empty path is the module's own weight
    return frozenset(path for path in reader.found if path)


class _Reader:
    """Follows the calls in the `forward` of one class. `found` collects the paths of what they read."""

    def __init__(self, cls: type) -> None:
        self.cls = cls
        self.found: set[Path] = set()
        self._seen: set[tuple[Any, ...]] = set()

    def follow(
        self,
        function: Any,
        args: list[frozenset[Path]],
        kwargs: Mapping[str, frozenset[Path]],
        depth: int,
    ) -> None:
        """Collects reads in a function whose arguments denote these paths. The first argument may be self."""
        function = getattr(function, "__func__", inspect.unwrap(function))
        code = getattr(function, "__code__", None)
        tree = None if code is None else _parsed(function)
        if tree is None or depth > _DEPTH:
            return
        names = [a.arg for a in (*tree.args.posonlyargs, *tree.args.args)]
        env: dict[str, frozenset[Path]] = {**dict(zip(names, args, strict=False)), **kwargs}
        key = (code, tuple(sorted((n, tuple(sorted(p))) for n, p in env.items())))
        if key in self._seen:
            return
        self._seen.add(key)
        # twice, because a loop may use a name above the line that assigns it
        for _ in range(2):
            for node in ast.walk(tree):
                self._bind(node, env)
        harmless = {id(n) for node in ast.walk(tree) for n in _only_looked_at(node)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and id(node) not in harmless:
                if node.attr in _READ and isinstance(node.ctx, ast.Load):
                    self.found |= self._paths(node.value, env)
            elif isinstance(node, ast.Call):
                self._call(node, env, getattr(function, "__globals__", {}), depth)

    def _bind(self, node: ast.AST, env: dict[str, frozenset[Path]]) -> None:
        """Adds what an assignment or a loop lets a name denote."""
        if isinstance(node, ast.Assign) and len(node.targets) == 1:
            target, paths = node.targets[0], self._paths(node.value, env)
        elif isinstance(node, ast.NamedExpr):
            target, paths = node.target, self._paths(node.value, env)
        elif isinstance(node, (ast.For, ast.comprehension)):
            inner = _iterated(node.iter)
            target, paths = node.target, self._paths(inner, env)
            if not isinstance(inner, (ast.Tuple, ast.List)):  # its elements are in `paths` already
                paths = _children(paths)
        else:
            return
        # `for i, layer in enumerate(layers)`
        names = target.elts if isinstance(target, ast.Tuple) else [target]
        for name in names:
            if isinstance(name, ast.Name) and paths:
                env[name.id] = env.get(name.id, _NOTHING) | paths

    def _paths(self, node: ast.AST, env: _Env) -> frozenset[Path]:
        """The modules below self that an expression may denote."""
        if isinstance(node, ast.Name):
            return env.get(node.id, _NOTHING)
        if isinstance(node, ast.Attribute):
            return frozenset((*path, node.attr) for path in self._paths(node.value, env))
        if isinstance(node, ast.Subscript):
            return _children(self._paths(node.value, env))
        if isinstance(node, ast.IfExp):
            return self._paths(node.body, env) | self._paths(node.orelse, env)
        if isinstance(node, (ast.Tuple, ast.List)):
            return frozenset().union(*(self._paths(e, env) for e in node.elts))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            if node.func.id == "getattr" and len(node.args) > 1:
                name = node.args[1]
                known = isinstance(name, ast.Constant) and isinstance(name.value, str)
                step = name.value if known else _ANY_CHILD  # type: ignore[attr-defined]
                return frozenset((*path, str(step)) for path in self._paths(node.args[0], env))
        return _NOTHING

    def _call(self, node: ast.Call, env: _Env, names: Mapping[str, Any], depth: int) -> None:
        """Follows a call of a method of self, or of a function that takes a module."""
        args = [self._paths(arg, env) for arg in node.args]
        kwargs = {k.arg: self._paths(k.value, env) for k in node.keywords if k.arg}
        function, first = self._callee(node.func, env, names)
        if isinstance(node.func, ast.Name) and node.func.id == "getattr" and len(node.args) > 1:
            name = node.args[1]
            if isinstance(name, ast.Constant) and name.value in _READ:
                self.found |= args[0]
        elif function is not None and (first or any(args) or any(kwargs.values())):
            self.follow(function, [*first, *args], kwargs, depth + 1)

    def _callee(
        self, node: ast.AST, env: _Env, names: Mapping[str, Any]
    ) -> tuple[Callable[..., Any] | None, list[frozenset[Path]]]:
        """The function that is called, and self if it is a method."""
        if isinstance(node, ast.Name):
            found = names.get(node.id)
            return (found if inspect.isroutine(found) else None), []
        if not isinstance(node, ast.Attribute):
            return None, []
        own = frozenset({()})
        parent = isinstance(node.value, ast.Call) and getattr(node.value.func, "id", "") == "super"
        if self._paths(node.value, env) == own or parent:
            for base in self.cls.__mro__[parent:]:
                if node.attr in base.__dict__ and base is not nn.Module:
                    found = base.__dict__[node.attr]
                    static = isinstance(found, staticmethod)
                    return getattr(found, "__func__", found), [] if static else [own]
        elif isinstance(node.value, ast.Name):
            found = getattr(names.get(node.value.id), node.attr, None)
            return (found if inspect.isfunction(found) else None), []
        return None, []


def _only_looked_at(node: ast.AST) -> list[ast.expr]:
    """Parts of an expression whose numbers stay unused: `w` in `w.dtype`, `isinstance(w, ...)`, `w is None`."""
    if isinstance(node, ast.Attribute) and node.attr in _HARMLESS:
        return [node.value]
    if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("isinstance", "type", "id"):
        return node.args
    if isinstance(node, ast.Compare) and all(isinstance(o, (ast.Is, ast.IsNot)) for o in node.ops):
        return [node.left, *node.comparators]
    return []


def _children(paths: frozenset[Path]) -> frozenset[Path]:
    return frozenset((*path, _ANY_CHILD) for path in paths)


def _iterated(node: ast.AST) -> ast.AST:
    """What a loop runs over, inside `enumerate`, `zip` and `reversed` (only their first argument)."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.args:
        return node.args[0] if node.func.id in ("enumerate", "zip", "reversed") else node
    return node


@functools.cache
def _parsed(function: Any) -> ast.FunctionDef | ast.AsyncFunctionDef | None:
    """The function's definition, or None if there is no source."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError, ValueError):
        return None
    found = tree.body[0] if tree.body else None
    return found if isinstance(found, (ast.FunctionDef, ast.AsyncFunctionDef)) else None
