"""What the source of an attention module of transformers says about it."""

from __future__ import annotations

import ast
import functools
import inspect
import sys
import textwrap
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn


def has_sdpa(module: nn.Module) -> bool:
    """Whether the models of the module's file may run SDPA, which knows no soft cap and no attention sink."""
    return bool(_has_sdpa(type(module).__module__))


_WITH_SDPA: dict[str, bool] = {}  # torch.compile would look into functools.cache, and warn


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _has_sdpa(file: str) -> bool:
    if file not in _WITH_SDPA:
        _WITH_SDPA[file] = _all_models_run_sdpa(file)
    return _WITH_SDPA[file]


def _all_models_run_sdpa(file: str) -> bool:
    from transformers import PreTrainedModel

    models = [
        c
        for c in vars(sys.modules[file]).values()
        if isinstance(c, type) and issubclass(c, PreTrainedModel) and c.__module__ == file
    ]
    return all(
        c._supports_sdpa for c in models
    )  # false if one is not: its attention may be this one


def eager_attention(module: nn.Module) -> Callable[..., Any] | None:
    """The eager attention function of the module's file."""
    return getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)


def changes_keys(module: nn.Module) -> bool:
    """Whether a module reads the keys or values that `Cache.update` returned, other than to pass them to attention.

    It would take the new tokens for all tokens: it shares them with other layers, or measures their length.
    """
    kind: Any = type(module)
    return _changes_keys(kind)


@functools.cache
def _changes_keys(kind: Any) -> bool:
    try:
        source = inspect.getsource(inspect.unwrap(kind.forward))
        tree = ast.parse(textwrap.dedent(source))
    except (OSError, TypeError, SyntaxError):
        return False  # `Int8Layer.update` still notices keys that are not the same
    updates = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and _called(node.value) == "update"
    ]
    if not updates:
        return False
    targets = [n for node in updates for t in node.targets for n in ast.walk(t)]
    names = {n.id for n in targets if isinstance(n, ast.Name)}
    first = min(node.lineno for node in updates)
    inside = {id(n) for node in updates for n in ast.walk(node)}
    return any(
        n.id in names and n.lineno > first and id(n) not in inside and isinstance(n.ctx, ast.Load)
        for n in _outside_attention(tree)
        if isinstance(n, ast.Name)
    )


def _called(node: ast.AST) -> str:
    """The last part of the name of a called function, or nothing."""
    if not isinstance(node, ast.Call):
        return ""
    return node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")


def _outside_attention(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes but the arguments of calls of attention functions."""
    for child in ast.iter_child_nodes(node):
        if not _called(child).endswith(("attention_interface", "attn")):
            yield child
            yield from _outside_attention(child)
