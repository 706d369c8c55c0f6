"""The tokens of one attention layer in an int8 cache: how they are stored, written and read."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from smoothquant_kernels import ops
from smoothquant_kernels.errors import SmoothQuantError
from smoothquant_kernels.ops.cache_checks import MAX_HEAD
from smoothquant_kernels.ops.checks import fits_rotation
from smoothquant_kernels.ops.rotate import rotated
from smoothquant_kernels.reference import HEAD_MULTIPLE, padded_k
from smoothquant_kernels.schemes import MAX_ROTATION


@dataclass(frozen=True)
class Int8Tokens:
    """Keys and values [B, H, tokens, D padded] int8, and their scales [B, H, tokens] float32 (None: static)."""

    k: Tensor
    v: Tensor
    k_scale: Tensor | None
    v_scale: Tensor | None

    @property
    def count(self) -> int:
        return self.k.shape[2]

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors())

    def tensors(self) -> list[Tensor]:
        return [t for t in (self.k, self.v, self.k_scale, self.v_scale) if t is not None]

    def map(self, change: Callable[[Tensor], Tensor]) -> Int8Tokens:
        return Int8Tokens(
            change(self.k),
            change(self.v),
            None if self.k_scale is None else change(self.k_scale),
            None if self.v_scale is None else change(self.v_scale),
        )

    def narrow(self, first: int, count: int) -> Int8Tokens:
        """A view of some adjacent tokens."""
        return self.map(lambda t: t.narrow(2, first, count))

    def copy_from(self, first: int, other: Int8Tokens) -> None:
        """Overwrites the tokens from `first` on. The others may overlap with them."""
        for mine, theirs in zip(
            self.narrow(first, other.count).tensors(), other.tensors(), strict=True
        ):
            mine.copy_(theirs.clone())  # a GPU copies in any order


@dataclass
class HeadQuantizer:
    """How a layer stores a token: the arguments that `kv_append` and `decode_attention_s8` share.

    `bind` completes it at the first token, when the sizes, the type and the device are known.
    """

    layer: int
    rotation: int | None
    """None: the largest that the head sizes allow."""
    static: bool = False
    k_smooth: Tensor | None = None
    v_smooth: Tensor | None = None
    k_dim: int = 0
    v_dim: int = 0
    dtype: torch.dtype = torch.float32
    k_inverse: Tensor | None = None
    v_inverse: Tensor | None = None

    def bind(self, k: Tensor, v: Tensor) -> HeadQuantizer:
        """The same for the sizes, the type and the device of k and v [B, H, T, D].

        Raises:
            SmoothQuantError: a head has too many channels, or does not fit the rotation or the calibration.
        """
        sizes = (k.shape[3], v.shape[3])
        if max(sizes) > MAX_HEAD:
            raise SmoothQuantError(
                f"Int8KVCache: layer {self.layer} caches heads of {max(sizes)} channels, at most {MAX_HEAD} are "
                "allowed; use a cache of transformers for this model."
            )
        rotation = self.rotation
        if rotation is None:
            both = (
                sizes[0] | sizes[1]
            )  # its lowest set bit is the largest power of two that divides both
            rotation = 0 if both % 2 else min(both & -both, MAX_ROTATION)
        for size in sizes:
            if not fits_rotation(rotation, size):
                raise SmoothQuantError(
                    f"Int8KVCache: rotation {rotation} does not divide the {size} channels of a head in layer "
                    f"{self.layer}; pass a power of two that does, 0, or 'auto'."
                )
        smooth: list[Tensor | None] = []
        for name, factors, x in (("keys", self.k_smooth, k), ("values", self.v_smooth, v)):
            shape = (x.shape[1], x.shape[3])
            if factors is not None and tuple(factors.shape) != shape:
                raise SmoothQuantError(
                    f"Int8KVCache: the calibration has {list(factors.shape)} factors (heads, channels) of {name} for "
                    f"layer {self.layer}, but the layer caches {list(shape)}; calibrate this model."
                )
            smooth.append(None if factors is None else factors.to(x.device, torch.float32))
        inverse = [None if t is None else (1.0 / t).contiguous() for t in smooth]
        return replace(
            self,
            rotation=rotation,
            k_smooth=smooth[0],
            v_smooth=smooth[1],
            k_inverse=inverse[0],
            v_inverse=inverse[1],
            k_dim=sizes[0],
            v_dim=sizes[1],
            dtype=k.dtype,
        )

    @property
    def groups(self) -> int:
        assert self.rotation is not None, "bind comes first"
        return self.rotation

    def allocate(self, k: Tensor, capacity: int) -> Int8Tokens:
        """Room for so many tokens, all zero."""
        batch, heads = k.shape[:2]
        shape, device = (batch, heads, capacity), k.device
        sizes = [padded_k(d, HEAD_MULTIPLE) for d in (self.k_dim, self.v_dim)]
        with writable_later():
            keys, values = (torch.zeros(*shape, d, dtype=torch.int8, device=device) for d in sizes)
            if self.static:
                return Int8Tokens(keys, values, None, None)
            scales = [torch.zeros(shape, device=device) for _ in sizes]
        return Int8Tokens(keys, values, *scales)

    def append(
        self,
        tokens: Int8Tokens,
        k: Tensor,
        v: Tensor,
        positions: Tensor | None = None,
        *,
        ring: bool = False,
    ) -> None:
        """Writes new tokens."""
        ops.kv_append(
            _channels_adjacent(k),
            _channels_adjacent(v.to(k.dtype)),
            tokens.k,
            tokens.v,
            k_scale=tokens.k_scale,
            v_scale=tokens.v_scale,
            positions=positions,
            k_inv_smooth=self.k_inverse,
            v_inv_smooth=self.v_inverse,
            rotation=self.groups,
            ring=ring,
        )

    def attend(
        self,
        q: Tensor,
        tokens: Int8Tokens,
        scale: float,
        *,
        mask: Tensor | None,
        lengths: Tensor | None,
        ring: bool,
    ) -> Tensor:
        """Attention [B, Hq, T, D] of the newest tokens."""
        return ops.decode_attention_s8(
            _channels_adjacent(q),
            tokens.k,
            tokens.v,
            scale,
            k_scale=tokens.k_scale,
            v_scale=tokens.v_scale,
            lengths=lengths,
            mask=mask,
            k_smooth=self.k_smooth,
            v_smooth=self.v_smooth,
            rotation=self.groups,
            ring=ring,
        )

    def dequantize(self, tokens: Int8Tokens) -> tuple[Tensor, Tensor]:
        """(keys, values) [B, H, tokens, D] in the type of the model. A token with a NaN or Inf is all NaN."""
        k = self._floats(tokens.k, tokens.k_scale, self.k_smooth, self.k_dim)
        return k, self._floats(tokens.v, tokens.v_scale, self.v_smooth, self.v_dim)

    def _floats(self, x_q: Tensor, scale: Tensor | None, smooth: Tensor | None, dim: int) -> Tensor:
        x = x_q[..., :dim].float()
        if scale is not None:
            x = x * scale[..., None]
        if self.groups:
            x = rotated(x, self.groups) / self.groups
        if smooth is not None:
            x = x * smooth[:, None]
        return x.to(self.dtype)


def writable_later() -> AbstractContextManager[object]:
    """Tensors made inside may be written outside of the `torch.inference_mode` that is on."""
    return nullcontext() if torch.compiler.is_compiling() else torch.inference_mode(False)


def _channels_adjacent(x: Tensor) -> Tensor:
    x = x.detach()
    return x if x.stride(3) == 1 else x.contiguous()
