"""The attention implementation "int8_kv" of transformers: decoding reads the int8 cache, all else float tensors."""

from __future__ import annotations

import sys
import weakref
from typing import Any

import torch
from torch import Tensor, nn

from smoothquant_kernels.errors import SmoothQuantError
from smoothquant_kernels.kv_cache.module_source import changes_keys, eager_attention, has_sdpa
from smoothquant_kernels.kv_cache.step import ATTENTION, STEP, Step
from smoothquant_kernels.ops.cache_checks import MAX_QUERY_TOKENS

#: Arguments that change the scores or their sum, which neither the kernel nor SDPA of transformers knows.
_EAGER_ONLY = ("softcap", "s_aux")


def register_attention() -> None:
    """Makes `attn_implementation="int8_kv"` known to transformers, in this process. A second call changes nothing."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(ATTENTION, int8_attention)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)


def use_int8_attention(model: nn.Module) -> nn.Module:
    """Lets a model of transformers read an `Int8KVCache` as int8 while it generates.

    Without a cache of this kind, with prompts and in training, attention computes what `sdpa` computes. Soft caps and
    attention sinks run in the model's own `eager` attention on float copies of the cache.

    Args:
        model: of transformers. Its configuration is changed.

    Returns:
        The model.

    Raises:
        SmoothQuantError: the model has no choice of attention implementations.

    Equivalent to:
        register_transformers()
        model.set_attn_implementation("int8_kv")

    Source: Hugging Face transformers, `AttentionInterface`.
    """
    choose = getattr(model, "set_attn_implementation", None)
    if choose is None:
        raise SmoothQuantError(
            f"use_int8_attention needs a model of transformers, got {type(model).__name__}."
        )
    register_attention()
    choose(ATTENTION)
    config: Any = model.config
    if config.get_text_config(decoder=True)._attn_implementation != ATTENTION:
        raise SmoothQuantError(
            f"use_int8_attention: {type(model).__name__} has its own attention, which transformers cannot replace; "
            "an Int8KVCache works with this model, but it is read as float tensors."
        )
    return model


def int8_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """An attention function of transformers: [B, T, Hq, D], and the weights where they were computed."""
    step: Step | None = kwargs.pop(STEP, None)
    rest = {"dropout": dropout, "scaling": scaling, **kwargs}
    if step is None:
        return _float_attention(module, query, key, value, attention_mask, rest)
    _take(step, module, key, value, attention_mask, kwargs)
    if step.empty:
        if attention_mask is not None:  # the columns of tokens to come
            attention_mask = attention_mask[..., : key.shape[2]]
    elif dropout == 0 and _kernel_can(step, module, query, attention_mask, kwargs):
        scale = query.shape[3] ** -0.5 if scaling is None else float(scaling)
        y = step.layer.quantizer.attend(
            query, step.tokens, scale, mask=attention_mask, lengths=step.lengths, ring=step.ring
        )
        return y.transpose(1, 2).contiguous(), None
    else:
        key, value = step.full()
        if attention_mask is None and query.shape[2] > 1 and _is_causal(module, kwargs):
            attention_mask = _causal(step, query.shape[2], key.shape[2], query.device)
    return _float_attention(module, query, key, value, attention_mask, rest)


def _take(
    step: Step,
    module: nn.Module,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    kwargs: dict[str, Any],
) -> None:
    """Tells the layer that attention has this step, and finds out at its first tokens whether it can have the next."""
    if torch.compiler.is_compiling():
        return
    layer, unchanged = step.layer, key is step.k and value is step.v
    layer.waiting = None
    if layer.direct is None:
        layer.direct = (
            unchanged
            and (mask is None or mask.dtype == torch.bool)
            and kwargs.get("position_bias") is None
            and not changes_keys(module)
        )
    elif not unchanged and not step.empty:
        raise SmoothQuantError(
            f"Int8KVCache: {type(module).__name__} changed keys or values between the cache and attention, so it "
            "cannot read the cache as int8: call model.set_attn_implementation('sdpa') and start again."
        )


def _kernel_can(
    step: Step, module: nn.Module, q: Tensor, mask: Tensor | None, kwargs: dict[str, Any]
) -> bool:
    """Whether `decode_attention_s8` computes what SDPA would."""
    if step.tokens is None or q.shape[2] > MAX_QUERY_TOKENS:
        return False
    if not q.shape[3] == step.k.shape[3] == step.v.shape[3] or q.shape[1] % step.k.shape[1]:
        return False
    if any(kwargs.get(name) is not None for name in (*_EAGER_ONLY, "position_bias")):
        return False
    if not has_sdpa(module):
        return False
    if torch.is_grad_enabled() and (q.requires_grad or step.k.requires_grad):
        return False
    if mask is not None and (
        mask.dtype != torch.bool or mask.dim() != 4 or mask.shape[3] != step.tokens.count
    ):
        return False
    if q.shape[2] == 1:
        return True
    if mask is None:
        return _is_causal(module, kwargs)
    return not torch.compiler.is_compiling() and _hides_later_tokens(step, mask)


def _is_causal(module: nn.Module, kwargs: dict[str, Any]) -> bool:
    given = kwargs.get("is_causal")
    return bool(getattr(module, "is_causal", True) if given is None else given)


def _causal(step: Step, count: int, columns: int, device: torch.device) -> Tensor:
    """Which columns each new token sees, [1, 1, T, columns] bool."""
    last = step.first + torch.arange(count, device=device)[:, None]
    return (torch.arange(columns, device=device) <= last)[None, None]


#: The mask that an earlier layer of this forward pass had, that layer, and whether the mask is causal.
_asked: tuple[weakref.ref[Tensor], int, bool] | None = None


def _hides_later_tokens(step: Step, mask: Tensor) -> bool:
    """Whether a mask lets no token see a later one, as the kernel does. Asked once for all layers: it stops a GPU."""
    global _asked
    layer, asked = step.layer.quantizer.layer, _asked  # another thread may ask meanwhile
    if asked is None or asked[0]() is not mask or layer <= asked[1]:
        causal = _causal(step, step.count, mask.shape[3], mask.device)
        asked = (weakref.ref(mask), layer, not bool((mask & ~causal).any()))
    else:
        asked = (asked[0], layer, asked[2])
    _asked = asked
    return asked[2]


def _float_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    kwargs: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:
    """SDPA, or the model's own attention where SDPA would leave something out."""
    if has_sdpa(module) and all(kwargs.get(name) is None for name in _EAGER_ONLY):
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        result: tuple[Tensor, Tensor | None] = sdpa_attention_forward(
            module, query, key, value, mask, **kwargs
        )
        return result
    eager = eager_attention(module)
    if eager is None:
        raise SmoothQuantError(
            f"attn_implementation={ATTENTION!r} needs the eager_attention_forward of {type(module).__name__}, which "
            f"{sys.modules[type(module).__module__].__name__} lacks; use attn_implementation='eager'."
        )
    if mask is None and query.shape[2] > 1 and _is_causal(module, kwargs):
        shape = (query.shape[2], key.shape[2])
        mask = torch.ones(shape, dtype=torch.bool, device=query.device)
        mask = mask.tril(key.shape[2] - query.shape[2])[None, None]
    if mask is not None and mask.dtype == torch.bool:
        lowest = torch.finfo(query.dtype).min
        mask = torch.zeros(mask.shape, dtype=query.dtype, device=query.device).masked_fill(
            ~mask, lowest
        )
    if kwargs["scaling"] is None:
        kwargs["scaling"] = query.shape[3] ** -0.5
    result = eager(module, query, key, value, mask, **kwargs)
    return result
