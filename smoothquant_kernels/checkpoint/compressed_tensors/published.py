"""The names under which transformers publishes tensors.

transformers 5 holds some architectures under other names than it publishes, and joins tensors of some of them (the
weights of experts). In transformers 4 both are the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from smoothquant_kernels.checkpoint.compressed_tensors.scheme import WEIGHT
from smoothquant_kernels.errors import SmoothQuantError


def as_published(model: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as `save_pretrained` would write them, which is how other libraries read them.

    Raises:
        SmoothQuantError: it would join or cut an int8 weight, whose scales it does not know.
    """
    published = _published(model, state)
    kept = {id(t): name for name, t in published.items()}
    for name, tensor in state.items():
        if tensor.dtype == torch.int8 and not kept.get(id(tensor), "").endswith(f".{WEIGHT}"):
            layer = name.removesuffix(f".{WEIGHT}")
            raise SmoothQuantError(
                f"transformers publishes {name} in another form, which int8 weights do not have: name {layer} in skip, "
                "or save the native format."
            )
    return published


def _published(model: Any, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:
        return dict(state)
    found: dict[str, Tensor] = revert_weight_conversion(model, dict(state))
    return found


def own_names(model: Any, published: Iterable[str]) -> tuple[dict[str, str], list[str]]:
    """The names in a float model of published tensors, which may have scales and the like beside a weight.

    Returns:
        Published name -> name in the model. And the names of the tensors that transformers joins from several.
    """
    state = {n: torch.empty_like(t, device="meta") for n, t in model.state_dict().items()}
    own = {id(t): name for name, t in state.items()}
    found = {name: own[id(t)] for name, t in _published(model, state).items() if id(t) in own}
    joined = [name for name in state if name not in set(found.values())]
    layers = {
        name.removesuffix(f".{WEIGHT}"): mine.removesuffix(f".{WEIGHT}")
        for name, mine in found.items()
    }
    names = {}
    for name in published:
        layer, dot, leaf = name.rpartition(".")
        names[name] = found.get(name) or f"{layers.get(layer, layer)}{dot}{leaf}"
    return names, joined
