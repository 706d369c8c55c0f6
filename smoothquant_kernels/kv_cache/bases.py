"""The classes of transformers that an int8 cache extends, and whether the installed version has them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import transformers

from smoothquant_kernels.errors import SmoothQuantError

#: The first version that hands a cache the keyword arguments of attention, through which attention finds the cache.
OLDEST = (5, 24)
if tuple(map(int, transformers.__version__.split(".")[:2])) < OLDEST:
    raise SmoothQuantError(
        f"Int8KVCache needs transformers >= {OLDEST[0]}.{OLDEST[1]}, which hands a cache the arguments of attention; "
        f"transformers {transformers.__version__} is installed: pip install -U transformers."
    )
if TYPE_CHECKING:
    # Stand-ins. Signatures differ between versions of transformers, and its own types do not allow what it does.
    class CacheLayerMixin:
        pass

    class LinearAttentionLayer:
        record_past: bool

        def __init__(self, *, number_of_states: int = 1) -> None: ...

    class Cache:
        layers: list[Any]

        def __init__(
            self, *, layers: list[Any], offloading: bool, offload_only_non_sliding: bool
        ) -> None: ...

    class DynamicCache(Cache):
        pass

    class DummyLayer:
        pass

    def get_layer_types_and_kwargs(config: Any) -> tuple[list[str], list[dict[str, Any]]]: ...
else:
    from transformers.cache_utils import (
        Cache,
        CacheLayerMixin,
        DummyLayer,
        DynamicCache,
        LinearAttentionLayer,
        get_layer_types_and_kwargs,
    )

__all__ = [
    "Cache",
    "CacheLayerMixin",
    "DummyLayer",
    "DynamicCache",
    "LinearAttentionLayer",
    "get_layer_types_and_kwargs",
]
