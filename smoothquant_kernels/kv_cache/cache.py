"""The int8 cache of keys and values for transformers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from smoothquant_kernels.errors import SmoothQuantError
from smoothquant_kernels.kv_cache.bases import (
    Cache,
    DummyLayer,
    DynamicCache,
    LinearAttentionLayer,
    get_layer_types_and_kwargs,
)
from smoothquant_kernels.kv_cache.calibration import SCHEMES, KVCalibration
from smoothquant_kernels.kv_cache.hybrid_layers import (
    Int8HybridLayer,
    Int8HybridSlidingLayer,
    Int8HybridStaticLayer,
    Int8HybridStaticSlidingLayer,
)
from smoothquant_kernels.kv_cache.layers import Int8DynamicLayer, Int8Layer, Int8SlidingLayer
from smoothquant_kernels.kv_cache.static_layers import Int8StaticLayer, Int8StaticSlidingLayer
from smoothquant_kernels.kv_cache.step import Attention
from smoothquant_kernels.kv_cache.tokens import HeadQuantizer
from smoothquant_kernels.schemes import MAX_ROTATION

#: The name of a layer type in transformers -> (the layer that grows, the layer of a fixed size).
_LAYERS: dict[str, tuple[Callable[..., Int8Layer], Callable[..., Int8Layer]]] = {
    "full_attention": (Int8DynamicLayer, Int8StaticLayer),
    "sliding_attention": (Int8SlidingLayer, Int8StaticSlidingLayer),
    "chunked_attention": (Int8SlidingLayer, Int8StaticSlidingLayer),
    "hybrid": (Int8HybridLayer, Int8HybridStaticLayer),
    "hybrid_sliding": (Int8HybridSlidingLayer, Int8HybridStaticSlidingLayer),
}
_LINEAR = ("conv", "linear_attention")
_NO_CACHE = "dummy"


class Int8KVCache(DynamicCache):
    """A cache of transformers that keeps keys and values in int8: about half the bytes of float16.

    `generate` and `forward` of a model take it as they take any cache. After `use_int8_attention(model)` each new token
    reads the cache as int8. With any other attention implementation the cache gives float copies, with the same
    contents, only slower. A prompt reads its own keys and values as the model computes them, before they are rounded.

    A layer holds `D + 4` bytes for a key or value of D channels of one head: int8, and a float32 scale (static scales:
    D). D counts up to a multiple of 16. A layer of full attention holds at most 63 tokens more than it was given, a
    layer with a window of W at most W + 126. Layers of linear attention are those of transformers.

    Args:
        model: of transformers, or its configuration.
        scheme: ``"per_token"``: a scale per token and head. ``"static"``: scales per head and channel, from a
            calibration.
        rotation: rotates so many adjacent channels of a head before they are quantized, which spreads outliers. A power
            of two that divides the head sizes, or 0. ``"auto"``: the largest, and 0 for static scales.
        calibration: the maxima of keys, queries and values. Without it, ``model.smoothquant_kv_calibration`` if the
            model has one.
        alpha: the migration strength of smoothing from keys to queries, 0 to 1; None: no smoothing. It needs a
            calibration. Static scales need no smoothing.
        max_cache_len: the number of tokens of a cache of fixed size, as for `StaticCache`. Without it, the cache grows
            as `DynamicCache` does.
        offloading, offload_only_non_sliding: as in `DynamicCache`: layers that are not in use wait on the CPU.

    Raises:
        SmoothQuantError: an argument is wrong, or the model has a layer that cannot be cached in int8. At the first
            token also: a head has more than 256 channels, or does not fit the rotation or the calibration.

    Equivalent to:
        a DynamicCache or StaticCache whose keys and values are `dequantize(quantize(rotate(x * inv_smooth)))`

    Source: SmoothQuant (Xiao et al., 2022) for smoothing; QuaRot (Ashkboos et al., 2024) for rotation; the layers of
    Hugging Face transformers.
    """

    def __init__(
        self,
        model: nn.Module | Any,
        *,
        scheme: str = "per_token",
        rotation: int | str = "auto",
        calibration: KVCalibration | None = None,
        alpha: float | None = None,
        max_cache_len: int | None = None,
        offloading: bool = False,
        offload_only_non_sliding: bool = True,
    ) -> None:
        config = _decoder_config(model)
        if calibration is None:
            calibration = getattr(model, "smoothquant_kv_calibration", None)
        _check(scheme, rotation, calibration, alpha, max_cache_len)
        self.scheme = scheme
        self._calibration, self._alpha = calibration, alpha
        self._rotation = _chosen_rotation(rotation, scheme)
        self._attention = Attention(config)
        self._size = {} if max_cache_len is None else {"max_cache_len": max_cache_len}
        types, arguments = get_layer_types_and_kwargs(config)
        layers = [
            self._layer(index, kind, kwargs)
            for index, (kind, kwargs) in enumerate(zip(types, arguments, strict=True))
        ]
        Cache.__init__(
            self,
            layers=layers,
            offloading=offloading,
            offload_only_non_sliding=offload_only_non_sliding,
        )

    def _layer(self, index: int, kind: str, kwargs: dict[str, Any]) -> Any:
        if kind in _LINEAR:
            return LinearAttentionLayer(**kwargs)
        if kind == _NO_CACHE:
            return DummyLayer()
        if kind not in _LAYERS:
            raise SmoothQuantError(
                f"Int8KVCache: layer {index} is of type {kind!r}, which has no int8 cache (there is one for "
                f"{', '.join(map(repr, _LAYERS))}); use a cache of transformers for this model."
            )
        quantizer = HeadQuantizer(index, self._rotation, static=self.scheme == "static")
        if self._calibration is not None and (quantizer.static or self._alpha is not None):
            if index not in self._calibration.layers:
                raise SmoothQuantError(
                    f"Int8KVCache: the calibration has the layers {sorted(self._calibration.layers)}, but not layer "
                    f"{index}; calibrate this model."
                )
            quantizer.k_smooth, quantizer.v_smooth = self._calibration.factors(
                index, self.scheme, self._alpha
            )
        return _LAYERS[kind]["max_cache_len" in self._size](
            quantizer, self._attention, **kwargs, **self._size
        )

    @property
    def int8_layers(self) -> list[Int8Layer]:
        """The layers that hold keys and values."""
        return [layer for layer in self.layers if isinstance(layer, Int8Layer)]

    @property
    def rotation(self) -> int | None:
        """How many channels are rotated; None while it is "auto" and no token has come."""
        layers = self.int8_layers
        return layers[0].quantizer.rotation if layers else 0

    @property
    def nbytes(self) -> int:
        """The bytes of all int8 keys and values and their scales, with the room for tokens to come."""
        return sum(layer.tokens.nbytes for layer in self.int8_layers if layer.tokens is not None)

    @property
    def bytes_per_token(self) -> int:
        """The bytes that one token of one sequence takes in all layers; 0 before the first token."""
        return sum(
            t.shape[1] * t.element_size() * (t.shape[3] if t.dim() == 4 else 1)
            for layer in self.int8_layers
            if layer.tokens is not None
            for t in layer.tokens.tensors()
        )


def _decoder_config(model: Any) -> Any:
    config = getattr(model, "config", model)
    if not hasattr(config, "get_text_config"):
        raise SmoothQuantError(
            f"Int8KVCache needs a model of transformers or its configuration, got {type(model).__name__}."
        )
    return config.get_text_config(decoder=True)


def _check(
    scheme: str,
    rotation: int | str,
    calibration: KVCalibration | None,
    alpha: float | None,
    max_cache_len: int | None,
) -> None:
    if scheme not in SCHEMES:
        allowed = " or ".join(map(repr, SCHEMES))
        raise SmoothQuantError(f"Int8KVCache: scheme must be {allowed}, got {scheme!r}.")
    powers = [1 << n for n in range(1, MAX_ROTATION.bit_length())]
    if rotation not in ("auto", 0, *powers):
        raise SmoothQuantError(
            f"Int8KVCache: rotation must be 'auto', 0 or a power of two from 2 to {MAX_ROTATION}, got {rotation!r}."
        )
    if scheme == "static" and rotation not in ("auto", 0):
        raise SmoothQuantError(
            f"Int8KVCache: static scales are those of channels before the rotation; drop rotation={rotation}, or "
            "choose scheme='per_token'."
        )
    if scheme == "static" and alpha is not None:
        raise SmoothQuantError(
            f"Int8KVCache: static scales already even out the channels of the keys; drop alpha={alpha}, or choose "
            "scheme='per_token'."
        )
    if alpha is not None and not (isinstance(alpha, (int, float)) and 0 <= alpha <= 1):
        raise SmoothQuantError(f"Int8KVCache: alpha must be from 0 to 1, got {alpha!r}.")
    if calibration is not None and not isinstance(calibration, KVCalibration):
        raise SmoothQuantError(
            f"Int8KVCache: calibration must be what calibrate_kv_cache returns, got {type(calibration).__name__}."
        )
    if calibration is None and (scheme == "static" or alpha is not None):
        what = "scheme='static'" if scheme == "static" else f"alpha={alpha}"
        raise SmoothQuantError(
            f"Int8KVCache: {what} needs a calibration, and the model has none; pass calibration=, or choose "
            "scheme='per_token' without alpha."
        )
    if max_cache_len is not None and (type(max_cache_len) is not int or max_cache_len < 1):
        raise SmoothQuantError(
            f"Int8KVCache: max_cache_len must be at least 1, got {max_cache_len!r}; give a whole number of tokens."
        )


def _chosen_rotation(rotation: int | str, scheme: str) -> int | None:
    if rotation == "auto":
        return 0 if scheme == "static" else None
    return int(rotation)
