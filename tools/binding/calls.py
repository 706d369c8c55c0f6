"""Calls every op of the binding and compares it with the package's CPU kernel; run by tools/binding/load.py.

It runs with any torch, in a folder with a copy of the package and a library of stand-in kernels.
The ops are called through the CUDA dispatch key with tensors in host memory. The numbers are chosen
so that every result is exact.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

torch.version.cuda = "13.0"  # so that the package accepts the library for this torch
from smoothquant_kernels import ops, reference  # noqa: E402
from smoothquant_kernels.backends import cuda  # noqa: E402

KEYS = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
X = torch.tensor([[1, -2, 3, 127], [-127, 4, 0, 5], [6, 127, -7, 8]]).float()
SIGNS = torch.tensor([[1, -1, 1, -1], [-1, -1, 1, 1]]).float()  # already normalized
W = torch.tensor([[1, 2, 3, 4], [-5, 6, -7, 8]], dtype=torch.int8)
# Two rows of gate, whose products are far from 0, and two of up.
GATED = torch.tensor(
    [[100, 0, 0, 100], [-5, 6, -7, 8], [1, 0, 0, 0], [0, 0, 0, 1]], dtype=torch.int8
)
W4 = reference.pack_w4(torch.tensor([[1, 2, 3, 4], [15, 0, 7, 8]]))
GROUP = torch.tensor([[[2, -3], [15, -100]]], dtype=torch.int8)
ONE, TWO = torch.ones(1), torch.tensor([2.0])
PER_TOKEN, PER_CHANNEL = torch.tensor([1.0, 2.0, 0.5]), torch.tensor([0.5, 4.0])
X_Q = X.to(torch.int8)
# Two experts: results 1 and 2 are the first's, result 3 is the second's, and result 0 is nobody's.
EXPERTS = torch.stack([W, W.flip(0)])
OFFSETS, ROWS = torch.tensor([1, 3, 4]).int(), torch.tensor([0, 2, 1, 2]).int()
EXPERT_SCALE = torch.stack([PER_CHANNEL, TWO.expand(2)])
RESULTS, PLACES = X[:, ::2], torch.tensor([[2, 0], [1, 1]]).int()
# Two sequences of one head, two tokens each; every value is an integer and every scale 1 or 2.
TOKENS = torch.stack([X, X.flip(1)])[:, None, :2]
TABLE, SECOND = torch.tensor([[2, 0], [1, 3]]).int(), torch.tensor([3, 2]).int()
# Scores are 0, so that the weights are halves and quarters.
QUERY, MASK = torch.zeros(2, 2, 1, 4), torch.tensor([1, 0, 0, 1]).bool().expand(2, 1, 1, 4)


def cache(blocks: int, size: int) -> dict[str, Any]:
    """An int8 cache of 4 channels, between others in memory."""
    made: dict[str, Any] = {}
    for half in ("k", "v"):
        numbers = torch.arange(blocks * 2 * size * 16).view(blocks, 2, size, 16) % 32
        made[f"{half}_cache"] = (4 * numbers - 64).to(torch.int8)[:, 1:]
        made[f"{half}_scale"] = torch.full((blocks, 2, size), 2.0)[:, 1:]
    return made


# op -> (positional arguments, keyword arguments), several calls each.
CALLS: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = [
    ("_saturate_s8", (X * 1.5,), {}),
    ("_saturate_s8", (X.t(),), {}),
    ("quantize", (X,), {}),
    ("quantize", (X.t(),), {"scale": ONE, "k_multiple": 16}),
    ("quantize", (X.reshape(3, 1, 4),), {"granularity": "tensor", "inv_smooth": torch.ones(4)}),
    ("rms_norm_quantize", (SIGNS, torch.full((4,), 127.0), 0.0), {}),
    ("rms_norm_quantize", (0 * SIGNS, 127 * torch.ones(4), 0.0), {"residual": SIGNS}),
    ("layer_norm_quantize", (SIGNS, 127 * torch.ones(4), torch.zeros(4), 0.0), {}),
    ("layer_norm_quantize", (SIGNS, None, None, 0.0), {"scale": ONE, "residual": 0 * SIGNS}),
    ("act_quantize", (X, "relu"), {"scale": ONE}),
    ("gemm_s8", (X_Q, W, ONE, PER_CHANNEL), {"out_dtype": torch.float32}),
    ("gemm_s8", (X_Q, W, PER_TOKEN, ONE), {"out_dtype": torch.float32, "bias": PER_CHANNEL.half()}),
    ("gemm_s8", (X_Q, W, ONE, ONE), {"out_dtype": torch.float32, "residual": torch.ones(3, 2)}),
    ("gemm_s8_requant", (X_Q, W, ONE, ONE, 16 * TWO), {"relu": True}),
    ("gemm_s8_gated", (X_Q, GATED, ONE, ONE, 2048 * TWO), {"dtype": torch.float32}),
    ("gemm_w4a8", (X_Q, W4, GROUP, ONE, ONE), {"out_dtype": torch.float32}),
    ("gemm_w4a8", (X_Q, W4, GROUP, PER_TOKEN, PER_CHANNEL), {"out_dtype": torch.float32, "bias": PER_CHANNEL}),
    ("linear_w4a8", (X, W4, GROUP, ONE), {"scale": ONE, "residual": torch.ones(3, 2)}),
    ("linear_s8", (X, W, PER_CHANNEL), {}),
    ("linear_s8", (X, W, ONE), {"bias": PER_CHANNEL, "scale": TWO / 2, "inv_smooth": torch.ones(4)}),
    ("linear_s8", (X, W, ONE), {"granularity": "tensor"}),
    ("linear_s8", (X, W, ONE), {"residual": torch.ones(3, 2)}),
    ("fused_linear_s8", (X, "relu", W, ONE), {"scale": ONE, "residual": torch.ones(3, 2)}),
    ("fused_linear_s8", (SIGNS, "layer_norm", W, ONE), {"norm_weight": 127 * torch.ones(4)}),
    ("grouped_gemm_s8", (X_Q, EXPERTS, PER_CHANNEL[1:], EXPERT_SCALE, OFFSETS),
     {"rows": ROWS, "bias": EXPERT_SCALE.half(), "out_dtype": torch.float32}),
    ("grouped_gemm_s8", (X_Q, EXPERTS.mT.contiguous().mT, PER_TOKEN, EXPERT_SCALE.t().contiguous().t(), OFFSETS - 1),
     {"out_dtype": torch.float32}),
    ("combine_experts", (RESULTS, PLACES, EXPERT_SCALE), {}),
    ("kv_append", (TOKENS, 2 * TOKENS), {**cache(2, 4), "positions": SECOND - 1}),
    ("kv_append", (TOKENS.mT.contiguous().mT, TOKENS),
     {**cache(4, 2), "positions": SECOND - 2, "block_table": TABLE, "k_inv_smooth": torch.ones(1, 4)}),
    ("decode_attention_s8", (QUERY,), {**cache(2, 4), "scale": 0.5}),
    ("decode_attention_s8", (QUERY,), {**cache(2, 4), "scale": 0.5, "mask": MASK}),
    ("decode_attention_s8", (QUERY,), {**cache(4, 2), "scale": 0.5, "lengths": SECOND - 1, "block_table": TABLE}),
    ("_gemm_s8_tile", (X_Q, W, ONE, ONE), {"out_dtype": torch.float32, "tile": -1, "splits": 0}),
]  # fmt: skip

# What the binding refuses, and a part of its message. The last call is refused by libtorch, whose
# message gives the reason or says where the reason is.
ENDLESS = torch.ones(1, 1).expand(2**30, 1)  # padded to 2**20 columns: a petabyte
REFUSED: list[tuple[str, tuple[Any, ...], dict[str, Any], str]] = [
    ("_saturate_s8", (X.half(),), {}, "x must be float32, got dtype|x must be float32, got float16"),
    ("quantize", (X,), {"granularity": "row"}, "granularity must be 'token' or 'tensor', got 'row'"),
    ("act_quantize", (X, "cube"), {}, "kind must be one of relu, gelu"),
    ("gemm_s8", (X, W, ONE, ONE), {"out_dtype": torch.float32}, "x_q must be int8, got float32"),
    ("grouped_gemm_s8", (X_Q, EXPERTS, ONE, EXPERT_SCALE, OFFSETS[1:]), {"out_dtype": torch.float32},
     r"offsets must have shape \(3,\) \(one more than experts\), got \(2,\)"),
    ("combine_experts", (RESULTS, PLACES.long(), EXPERT_SCALE), {}, "position must be int32, got int64"),
    ("quantize", (ENDLESS,), {"k_multiple": 2**20},
     "aoti_torch_empty_strided failed: .*(allocate memory|standard error)"),
]  # fmt: skip


def overload(name: str) -> Callable[..., Any]:
    return getattr(torch.ops.smoothquant_kernels, name).default  # type: ignore[no-any-return]


def bound(name: str, *args: Any, **options: Any) -> Any:
    """What the library's kernel returns."""
    return overload(name).redispatch(KEYS, *args, **options)  # type: ignore[attr-defined]


def copied(value: Any) -> Any:
    """With copies of its tensors, which keep their strides."""
    if isinstance(value, torch.Tensor):
        whole = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype)
        return whole.copy_(value) if 0 not in value.stride() else value
    if isinstance(value, dict):
        return {name: copied(item) for name, item in value.items()}
    return tuple(map(copied, value)) if isinstance(value, tuple) else value


def outcome(call: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """The results, and the arguments, of which an op may change some."""
    args, options = copied(args), copied(options)
    results = call(*args, **options)
    given = [value for value in (*args, *options.values()) if isinstance(value, torch.Tensor)]
    return [] if results is None else results, given


def same(got: Any, expected: Any) -> bool:
    if isinstance(got, torch.Tensor):
        return got.dtype == expected.dtype and torch.equal(got, expected)
    return all(map(same, got, expected))


def main() -> None:
    import re

    status = cuda.extension_status()
    assert status.available, status.reason
    uncalled = set(ops.OPS) - {name for name, _, _ in CALLS}
    assert not uncalled, f"no call of {sorted(uncalled)} in tools/binding/calls.py"
    for name in sorted({name for name, _, _ in CALLS}):
        assert cuda.has_cuda_kernel(name), f"the library has no kernel for {name}"
    for name, args, options in CALLS:
        got = outcome(partial(bound, name), args, options)
        expected = outcome(overload(name), args, options)
        assert same(got, expected), f"{name} {options}: got {got}, expected {expected}"
    for name, args, options, words in REFUSED:
        try:
            bound(name, *args, **options)
        except RuntimeError as error:
            assert re.search(words, str(error)), f"{name}: said '{error}', not '{words}'"
        else:
            raise AssertionError(f"{name} {options} was not refused")
    print(f"{torch.__version__}: {len(CALLS) + len(REFUSED)} calls right")


if __name__ == "__main__":
    main()
