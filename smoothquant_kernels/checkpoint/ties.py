"""Int8 output heads and the embeddings that their float weights were tied to."""

from __future__ import annotations

from typing import Any

from torch import nn

from smoothquant_kernels.modeling.view import ModelView
from smoothquant_kernels.nn.kinds import is_quantized
from smoothquant_kernels.nn.own_weight import keep_apart

#: The attributes of a transformers model (release 5) with the names of tied parameters: target -> source. The first one
#: is the class's, for which an instance may have its own.
_TIES = ("_tied_weights_keys", "all_tied_weights_keys")


def keep_heads_apart(model: nn.Module) -> list[tuple[nn.Module, str, dict[str, str]]]:
    """Keeps the int8 heads of a model from being tied to an embedding again.

    Returns:
        The attributes to set (module, name, value), so that transformers looks for no parameter that a head lacks.
    """
    heads = {model.get_submodule(name) for name in ModelView(model).heads}
    int8 = {head for head in heads if is_quantized(head)}
    for head in int8:
        keep_apart(head)
    found = []
    for module in model.modules() if int8 else ():
        for attribute in _TIES:
            ties: Any = getattr(module, attribute, None)
            if isinstance(ties, dict):
                left = {t: s for t, s in ties.items() if _owner(module, t) not in int8}
                if left != ties:
                    found.append((module, attribute, left))
    return found


def _owner(module: nn.Module, name: str) -> nn.Module | None:
    try:
        return module.get_submodule(name.rpartition(".")[0])
    except AttributeError:
        return None
