"""What the source of an attention module of transformers says about it."""

from __future__ import annotations

import ast
import functools
import inspect
import sys
import textwrap
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn


@functools.cache
def has_sdpa(module: type[nn.Module]) -> bool:
    """Whether the models of the module's file may run SDPA, which knows no soft cap and no attention sink."""
    from transformers import PreTrainedModel

    file = sys.modules.get(module.__module__)
    models = [
        c
        for c in vars(file).values()
        if isinstance(c, type) and issubclass(c, PreTrainedModel) and c is not PreTrainedModel
    ]
    return all(c._supports_sdpa for c in models if c.__module__ == module.__module__)


@functools.cache
def eager_attention(module: type[nn.Module]) -> Callable[..., Any] | None:
    """The eager attention function of the module's file."""
    return getattr(sys.modules.get(module.__module__), "eager_attention_forward", None)


@functools.cache
def changes_keys(module: type[nn.Module]) -> bool:
    """Whether a module reads the keys or values that `Cache.update` returned, other than to pass them to attention.

    It would take the new tokens for all tokens: it shares them with other layers, or measures their length.
    """
    try:
        source = inspect.getsource(inspect.unwrap(module.forward))
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
    names = {n.id for node in updates for t in node.targets for n in ast.walk(t) if _is_name(n)}
    first = min(node.lineno for node in updates)
    inside = {id(n) for node in updates for n in ast.walk(node)}
    return any(
        n.id in names and n.lineno > first and id(n) not in inside and isinstance(n.ctx, ast.Load)
        for n in _outside_attention(tree)
        if isinstance(n, ast.Name)
    )


def _is_name(node: ast.AST) -> bool:
    return isinstance(node, ast.Name)


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
