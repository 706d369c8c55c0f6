"""Checks the layer names and patterns of a configuration against a model and refuses those without effect."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Collection, Iterable

from torch import nn

from smoothquant_kernels.config import BY_LAYER, SmoothQuantConfig
from smoothquant_kernels.errors import SmoothQuantError
from smoothquant_kernels.modeling.view import ModelView, holds_matrices
from smoothquant_kernels.nn.float_linear import is_float_linear
from smoothquant_kernels.nn.kinds import is_quantized

_SUGGESTIONS = 2
_WILDCARDS = frozenset("*?[")


def check_patterns(model: nn.Module, config: SmoothQuantConfig) -> None:
    """Raises SmoothQuantError if `quantize_head`, or a name or pattern of another setting, reaches no layer.

    A pattern may match a layer that is skipped anyway (an output head, a norm), but not only containers of linear
    layers. Settings are looked up by the layers' own names, so the name of a container has no effect.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    modules.pop("", None)
    linears = [name for name, module in modules.items() if _is_linear(module)]
    holders = {p for name in linears for p in _parents(name)} - set(linears)
    if config.quantize_head:
        _check_heads(model, config, linears)
    for setting in ("skip", *BY_LAYER):
        for pattern in getattr(config, setting):
            # search results name every layer, so this avoids matching hundreds of names with hundreds of names
            exact = pattern in modules
            found = [pattern] if exact else (n for n in modules if fnmatch.fnmatchcase(n, pattern))
            matched = list(found)
            if not matched:
                nearest = " or ".join(map(repr, _nearest(pattern, linears)))
                raise SmoothQuantError(
                    f"{setting}: {pattern!r} matches no layer of {type(model).__name__}"
                    + (f"; did you mean {nearest}?" if nearest else ".")
                    + " A layer is given by its full name or by a shell-style pattern of it."
                )
            if holders.issuperset(matched):
                raise SmoothQuantError(
                    f"{setting}: {pattern!r} matches {matched[0]}, which holds linear layers but is none itself, so "
                    f"the setting would reach nothing; {pattern + '.*'!r} reaches the layers inside."
                )


def _check_heads(model: nn.Module, config: SmoothQuantConfig, linears: Collection[str]) -> None:
    heads = sorted(ModelView(model).heads.intersection(linears))
    if not heads:
        raise SmoothQuantError(
            f"quantize_head: {type(model).__name__} has no output head (a linear that get_output_embeddings returns, "
            "or one named lm_head), so the setting would reach nothing: leave it out."
        )
    for name in heads:
        if (
            config.float_pattern(name) is None
            and config.schemes.get(name, "per_token") != "per_token"
        ):
            raise SmoothQuantError(
                f"schemes: {name!r} is {config.schemes[name]}, but an int8 output head always has a scale per token: "
                "leave the head out of schemes, or leave out quantize_head."
            )


def patterns_within(
    config: SmoothQuantConfig, names: Iterable[str], heads: Collection[str] = ()
) -> SmoothQuantConfig:
    """Returns the configuration for a part of a model, without names and patterns that match none of `names`.

    `heads`: the model's output heads. A part without any has no `quantize_head`.
    """
    names = list(names)

    def within(pattern: str) -> bool:
        return any(fnmatch.fnmatchcase(name, pattern) for name in names)

    return config.replace(
        skip=tuple(filter(within, config.skip)),
        quantize_head=config.quantize_head and not set(heads).isdisjoint(names),
        **{
            setting: {p: v for p, v in getattr(config, setting).items() if within(p)}
            for setting in BY_LAYER
        },
    )


def _is_linear(module: nn.Module) -> bool:
    return is_float_linear(module) or is_quantized(module) or holds_matrices(module)


def _parents(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts))]


def _nearest(pattern: str, linears: Iterable[str]) -> list[str]:
    """The names, or patterns if one was given, that are most like `pattern`."""
    candidates: dict[str, None] = {}
    for name in linears:
        if not _WILDCARDS.intersection(pattern):
            candidates[name] = None
            continue
        parts = ["*" if part.isdigit() else part for part in name.split(".")]
        candidates[".".join(parts)] = None
        tails = [parts[i:] for i in range(1, len(parts)) if parts[i] != "*"]
        candidates |= {".".join(["*", *tail]): None for tail in tails}
    return difflib.get_close_matches(pattern, list(candidates), n=_SUGGESTIONS, cutoff=0.5)
