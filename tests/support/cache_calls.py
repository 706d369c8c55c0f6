"""Calls of the ops with an int8 cache, and wrong ones with the exception and a part of the sentence that they raise."""

from __future__ import annotations

from typing import Any

import torch

from tests.support.op_calls import Call

B, H, GROUP, T, D, SIZE = 2, 2, 3, 2, 20, 8


def _cache(dim: int = D, size: int = SIZE, blocks: int = B) -> dict[str, Any]:
    padded = -(-dim // 16) * 16
    g = torch.Generator().manual_seed(3)
    made: dict[str, Any] = {}
    for half in ("k", "v"):
        shape = (blocks, H, size)
        made[f"{half}_cache"] = torch.randint(-127, 128, (*shape, padded), generator=g).to(
            torch.int8
        )
        made[f"{half}_scale"] = torch.rand(shape, generator=g) + 0.01
    return made


def _numbers(*values: Any) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def _tokens(heads: int = H, tokens: int = T, dim: int = D, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(B, heads, tokens, dim, generator=g).bfloat16()


FACTORS = torch.rand(H, D, generator=torch.Generator().manual_seed(1)) + 0.5
TABLE = {"block_table": _numbers([1, 4], [0, 2])}


def append(**changes: Any) -> Call:
    arguments = {**_cache(), **changes}
    k, v = arguments.pop("k", _tokens()), arguments.pop("v", _tokens(seed=1))
    k_cache, v_cache = arguments.pop("k_cache"), arguments.pop("v_cache")
    return Call("kv_append", (k, v, k_cache, v_cache), arguments)


def attention(**changes: Any) -> Call:
    arguments = {**_cache(), **changes}
    q = arguments.pop("q", _tokens(H * GROUP))
    k_cache, v_cache = arguments.pop("k_cache"), arguments.pop("v_cache")
    scale = arguments.pop("scale", 0.25)
    return Call("decode_attention_s8", (q, k_cache, v_cache, scale), arguments)


def appends() -> list[Call]:
    """With every argument."""
    angle = torch.rand(1, T, 8, generator=torch.Generator().manual_seed(2))
    rope = {"cos": angle.cos(), "sin": angle.sin().half()}
    static = {"k_scale": None, "v_scale": None, "k_inv_smooth": FACTORS, "v_inv_smooth": FACTORS}
    return [
        append(),
        append(positions=_numbers(6, 1), rotation=4, k_inv_smooth=FACTORS, **rope),
        append(**static, positions=_numbers(7, 30), ring=True),
        append(**_cache(size=4, blocks=5), **TABLE, positions=_numbers(3, 5), v_inv_smooth=FACTORS),
    ]


def attentions() -> list[Call]:
    """With every argument."""
    static = {"k_scale": None, "v_scale": None, "k_smooth": FACTORS, "v_smooth": FACTORS}
    mask = torch.rand(B, 1, T, SIZE, generator=torch.Generator().manual_seed(4)) < 0.6
    return [
        attention(),
        attention(lengths=_numbers(5, 0), rotation=4, k_smooth=FACTORS, mask=mask),
        attention(**static, lengths=_numbers(7, 30), ring=True, window=3),
        attention(**_cache(size=4, blocks=5), **TABLE, lengths=_numbers(3, 8), v_smooth=FACTORS),
    ]


FLOATS = "must be float16 or bfloat16 or float32, got"
_SHORT = _cache(blocks=1)

REFUSED: list[tuple[Call, type[Exception], str]] = [
    (append(k=_tokens().double()), TypeError, f"k {FLOATS} float64"),
    (append(k=_tokens()[0]), ValueError, "k must have shape [B, H, T, D] with H >= 1 and D from 1"),
    (append(k=torch.ones(B, H, T, 257)), ValueError, "D from 1 to 256, got [2, 2, 2, 257]"),
    (append(v=_tokens().float()), TypeError, "v must be bfloat16, got float32"),
    (append(v=_tokens(tokens=3)), ValueError, "v must have shape [2, 2, 2, 20] (the tokens"),
    (append(k_cache=_tokens()), TypeError, "k_cache must be int8, got bfloat16"),
    (append(k_cache=torch.zeros(3).char()), ValueError, "k_cache must have shape [blocks, 2, "),
    (append(**_cache(dim=33)), ValueError, "k_cache must have shape [2, 2, 8, 32] (heads of"),
    (append(k_scale=torch.ones(B, H, 7)), ValueError, "k_scale must have shape [2, 2, 8] (one"),
    (append(v_scale=torch.ones(B, H, 8).half()), TypeError, "v_scale must be float32, got float16"),
    (
        append(k_scale=None, v_scale=None),
        ValueError,
        "without scales per token (dynamic), k_inv_smooth [2, 20]",
    ),
    (append(k_scale=None, k_inv_smooth=FACTORS), ValueError, "give both of k_scale and v_scale"),
    (append(k_inv_smooth=FACTORS[0]), ValueError, "k_inv_smooth must have shape [2, 20] (a factor"),
    (append(rotation=8), ValueError, "a power of two from 2 that divides D = 20, got 8"),
    (append(cos=torch.ones(1, T, 8)), ValueError, "give both of cos and sin, or neither"),
    (
        append(cos=torch.ones(1, T, 7), sin=torch.ones(1, T, 7)),
        ValueError,
        "cos and sin must have shape [B or 1, T, R] with R even and from 2 to 20, got [1, 2, 7]",
    ),
    (
        append(cos=torch.ones(1, T, 8), sin=torch.ones(1, T, 6)),
        ValueError,
        "sin must have shape [1, 2, 8] (of each new token), got [1, 2, 6]",
    ),
    (append(positions=_numbers(1)), ValueError, "positions must have shape [2] (of each first"),
    (append(positions=torch.zeros(2).long()), TypeError, "positions must be int32, got int64"),
    (append(**_SHORT), ValueError, "each sequence has one block, got 2 sequences and 1 blocks"),
    (append(**_SHORT, **TABLE), ValueError, "2 sequences need at least one block each, but the"),
    (append(**TABLE, ring=True), ValueError, "a ring has no block table; drop one of"),
    (append(**_cache(size=1)), ValueError, "2 tokens do not fit into a cache of 1"),
    (attention(q=_tokens(5)), ValueError, "the heads of k_cache [blocks, H, block size, D] must"),
    (attention(q=_tokens(6, tokens=9)), ValueError, "q has 9 tokens of a sequence, at most 8 are"),
    (attention(q=_tokens(6).int()), TypeError, f"q {FLOATS} int32"),
    (attention(k_scale=None, v_scale=None), ValueError, "k_smooth [2, 20] must give the static"),
    (attention(lengths=_numbers(1)), ValueError, "lengths must have shape [2] (tokens of each"),
    (attention(window=-1), ValueError, "window must be at least 0, got -1"),
    (attention(rotation=3), ValueError, "that divides D = 20, got 3"),
    (
        attention(mask=torch.ones(B, 2, T, SIZE).bool()),
        ValueError,
        "mask must have shape [2, 6, 2, 8] (True: attend), got [2, 2, 2, 8]",
    ),
    (attention(mask=torch.ones(B, 1, T, SIZE)), TypeError, "mask must be bool, got float32"),
    (attention(**_SHORT, **TABLE), ValueError, "2 sequences need at least one block each"),
    (
        attention(k_scale=None, v_scale=None, k_smooth=FACTORS, v_smooth=FACTORS, rotation=4),
        ValueError,
        "static scales are those of channels before the rotation; drop `rotation`, or give",
    ),
]

#: Strides, which a copy to a backend would change.
REFUSED_STRIDES: list[tuple[Call, str]] = [
    (
        attention(k_cache=_cache()["k_cache"].transpose(2, 3).contiguous().transpose(2, 3)),
        "the tokens of a head must be adjacent in k_cache (strides [.., .., 32, 1])",
    ),
    (
        append(v_scale=_cache(size=16)["v_scale"][..., ::2]),
        "the tokens of a head must be adjacent in v_scale",
    ),
]

#: What only a CPU can know without waiting: numbers in tensors.
REFUSED_VALUES: list[tuple[Call, str]] = [
    (
        append(positions=_numbers(0, 7)),
        "sequence 1 writes the positions 7 to 8, but the cache holds 0 to 7; make it larger.",
    ),
    (append(positions=_numbers(-1, 0)), "sequence 0 writes the positions -1 to 0, but the cache"),
    (append(positions=_numbers(-1, 0), ring=True), "sequence 0 writes the positions -1 to 0"),
    (append(positions=_numbers(0, 2**31 - 1)), "writes the positions 2147483647 to 2147483648"),
    (
        append(**_cache(size=4, blocks=4), **TABLE, positions=_numbers(3, 0)),
        "block_table gives sequence 0 block 4, but the cache has blocks 0 to 3.",
    ),
    (attention(lengths=_numbers(3, 9)), "sequence 1 has 9 tokens, but the cache holds 0 to 8."),
    (attention(lengths=_numbers(-1, 3)), "sequence 0 has -1 tokens, but the cache holds 0 to 8."),
    (attention(lengths=_numbers(-1, 3), ring=True), "sequence 0 has -1 tokens"),
    (
        attention(**_cache(size=4, blocks=4), **TABLE, lengths=_numbers(5, 0)),
        "block_table gives sequence 0 block 4, but the cache has blocks 0 to 3.",
    ),
]
