"""Records the largest queries, keys and values of each attention layer while a model runs."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from smoothquant_kernels.errors import SmoothQuantError
from smoothquant_kernels.kv_cache.calibration import KVCalibration, LayerMaxima

_EAGER = "eager"


class KVRecorder:
    """Merges the maxima of the attention layers of a model, call by call, within `watching`.

    Args:
        model: a decoder whose attention goes through transformers' `AttentionInterface`. It may be quantized, and
            optimized.

    Raises:
        SmoothQuantError: the model has no such layer, or is an encoder-decoder, which caches two kinds of keys.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        name, config = type(model).__name__, getattr(model, "config", None)
        if getattr(config, "is_encoder_decoder", False):
            raise SmoothQuantError(
                f"{name} is an encoder-decoder, whose cache has keys of its encoder as well: only decoders have an "
                "int8 cache."
            )
        self._layers: dict[nn.Module, int] = {}
        for module in model.modules():
            layer: Any = getattr(module, "layer_idx", None)
            if type(layer) is int:
                self._layers[module] = layer
        if not self._layers:
            raise SmoothQuantError(
                f"{name} has no attention layer of transformers that caches keys and values: only such decoders have "
                "an int8 cache."
            )
        self._mask: Tensor | None = None
        self._found: dict[int, list[Tensor]] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Records every call of the model's attention within the block.

        The attention implementations that the model uses are registered again, with functions that record and then
        call the registered one, so neither the model nor its configuration nor its masks change. Other models that run
        at the same time compute what they always do.
        """
        from transformers import AttentionInterface

        registered: dict[str, Any] = AttentionInterface._global_mapping
        names = {_implementation(m) for m in self._layers}
        before = {name: registered[name] for name in names & registered.keys()}
        try:
            for name in names:
                AttentionInterface.register(name, self._recording(before.get(name)))
            yield
        finally:  # what others have registered meanwhile stays
            for name in names:
                registered.pop(name, None)
            registered.update(before)

    def start(self, mask: Tensor | None) -> None:
        """Sets the mask [B, T] bool of the batch that runs next, False at padding; None without padding."""
        self._mask = mask

    def calibration(self, tokens: int) -> KVCalibration:
        """What was found.

        Raises:
            SmoothQuantError: no layer called its attention, or a maximum is NaN or Inf (the message names the layer).
        """
        if not self._found:
            raise SmoothQuantError(
                f"the attention of {type(self._model).__name__} does not go through the attention interface of "
                "transformers, or not with this implementation: only such models have an int8 cache; load it with "
                "sdpa attention."
            )
        for layer, maxima in sorted(self._found.items()):
            for name, t in zip("qkv", maxima, strict=True):
                if not bool(t.isfinite().all()):
                    raise SmoothQuantError(
                        f"{name} of attention layer {layer} holds NaN or Inf on the calibration data: calibrate on "
                        "other data, or in float32 or bfloat16, whose range is larger than float16's."
                    )
        return KVCalibration({n: LayerMaxima(*m) for n, m in sorted(self._found.items())}, tokens)

    def _recording(self, registered: Callable[..., Any] | None) -> Callable[..., Any]:
        def attention(
            module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
        ) -> Any:
            # Keys of another text (cross-attention) are as many as that has tokens.
            if module in self._layers and key.shape[2] == query.shape[2]:
                self._record(self._layers[module], query, key, value)
            function = _own_attention(module) if registered is None else registered
            return function(module, query, key, value, *args, **kwargs)

        return attention

    def _record(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> None:
        heads = key.shape[1]
        q, k, v = (_maxima(t, self._mask) for t in (query, key, value))
        new = [q.view(heads, -1, q.shape[-1]).amax(1), k, v]
        old = self._found.get(layer)
        # torch.maximum keeps a NaN.
        self._found[layer] = new if old is None else list(map(torch.maximum, old, new))


def _implementation(module: nn.Module) -> str:
    config: Any = getattr(module, "config", None)
    return str(getattr(config, "_attn_implementation", None) or _EAGER)


def _own_attention(module: nn.Module) -> Callable[..., Any]:
    """The eager attention of a model, which is a function of the file that defines its attention layer."""
    for cls in type(module).__mro__:
        found = getattr(sys.modules.get(cls.__module__), "eager_attention_forward", None)
        if found is not None:
            return found  # type: ignore[no-any-return]
    raise SmoothQuantError(
        f"the eager attention of {type(module).__name__} is not known: load the model with sdpa attention."
    )


def _maxima(t: Tensor, mask: Tensor | None) -> Tensor:
    """[heads, D] float32 on the CPU, of the tokens of [B, heads, T, D] that are not padding."""
    t = t.detach().abs()
    if mask is not None and tuple(mask.shape) == (t.shape[0], t.shape[2]):
        t = torch.where(mask.to(t.device)[:, None, :, None], t, 0)
    if not t.shape[0] * t.shape[2]:
        return torch.zeros(t.shape[1], t.shape[3])
    return t.amax((0, 2)).float().cpu()
