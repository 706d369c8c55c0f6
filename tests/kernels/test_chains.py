"""Ops that follow each other on a stream: each reads what the one before it wrote, in memory that others had before.

On Hopper a kernel may start before the one before it has ended; tests/csrc/test_overlap.py runs these chains so.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from smoothquant_kernels import ops, reference
from tests.support import cases, kv_calls
from tests.support.backends import Backend
from tests.support.compare import assert_bitwise_equal, count_result

#: Tokens on both sides of the GEMM for few tokens.
TOKENS = (1, 7, 12, 40)


@pytest.mark.parametrize("m", TOKENS)
def test_weights_that_were_just_written(backend: Backend, m: int) -> None:
    k, n = 320, 48
    x, w = cases.activations(m, k, torch.float16), cases.activations(n, k, torch.float16, 1)
    (x_q, x_scale), (w_q, w_scale) = reference.quantize(x), reference.quantize(w)
    expected = reference.gemm_s8(x_q, w_q, x_scale, w_scale)
    x, w = backend.put(x), backend.put(w)
    for turn in range(2):
        x_q, x_scale = ops.quantize(x, k_multiple=16)
        w_q, w_scale = ops.quantize(w, k_multiple=16)
        found = ops.gemm_s8(x_q, w_q, x_scale, w_scale, out_dtype=torch.float16)
        assert_bitwise_equal(found, expected, f"gemm_s8 {m}, turn {turn}")
        w_q, w_scale = ops.quantize(w, k_multiple=16)
        found = ops.linear_s8(x, w_q, w_scale)
        assert_bitwise_equal(found, expected, f"linear_s8 {m}, turn {turn}")
        count_result()


@pytest.mark.parametrize("m", TOKENS)
def test_a_chain_of_two_layers(backend: Backend, m: int) -> None:
    """Quantizer, GEMM, activation, GEMM with residual, twice: then in memory that the first turn has left."""
    k, n = 256, 64
    up, down = cases.gemm_operands(m, n, k), cases.gemm_operands(m, k, n, seed=1)
    layers = [backend.put(t) for t in (up.w_q, up.w_scale, down.w_q, down.w_scale)]
    x = cases.activations(m, k, torch.bfloat16)
    y = backend.put(x)
    for turn in range(2):
        x_q, x_scale = reference.quantize(x)
        h = reference.gemm_s8(x_q, up.w_q, x_scale, up.w_scale, out_dtype=torch.bfloat16)
        h_q, h_scale = reference.quantize(h.relu())
        x = reference.gemm_s8(
            h_q, down.w_q, h_scale, down.w_scale, residual=x, out_dtype=torch.bfloat16
        )
        q, q_scale = ops.quantize(y)
        g = ops.gemm_s8(q, layers[0], q_scale, layers[1], out_dtype=torch.bfloat16)
        q, q_scale = ops.act_quantize(g, "relu")
        y = ops.gemm_s8(q, layers[2], q_scale, layers[3], residual=y, out_dtype=torch.bfloat16)
        assert_bitwise_equal(y, x, f"{m}, turn {turn}")
        count_result()


@pytest.mark.parametrize("m", TOKENS)
def test_a_norm_after_a_gemm(backend: Backend, m: int) -> None:
    """The norm gives the same bits as on a copy of its input, which no kernel has just written."""
    k = 256
    down = cases.gemm_operands(m, k, 64)
    operands = [backend.put(t) for t in (down.x_q, down.w_q, down.x_scale, down.w_scale)]
    weight = backend.put(cases.inverse_smooth(k).bfloat16())
    residual = backend.put(cases.activations(m, k, torch.bfloat16))
    y = ops.gemm_s8(*operands, out_dtype=torch.bfloat16)
    found = ops.rms_norm_quantize(y, weight, 1e-5, residual=residual)
    again = ops.rms_norm_quantize(y.clone(), weight.clone(), 1e-5, residual=residual.clone())
    for a, b in zip(found, again, strict=True):
        assert_bitwise_equal(a, b, f"{m}")
    count_result()


def test_keys_and_values_of_a_gemm(backend: Backend) -> None:
    """A GEMM, the writer of the cache, then positions and keys that the next turn writes over."""
    tokens, heads, dim = 3, 2, 64
    layer = cases.gemm_operands(tokens, 2 * heads * dim, 96)
    operands = [backend.put(t) for t in (layer.x_q, layer.w_q, layer.x_scale, layer.w_scale)]
    y = reference.gemm_s8(layer.x_q, layer.w_q, layer.x_scale, layer.w_scale)
    expected = kv_calls.problem(batch=1, heads=heads, tokens=tokens, dim=dim, rotation=64)
    found = backend.move({n: t for n, t in expected.items() if n in kv_calls.WRITTEN})
    found = {name: backend.put(t) for name, t in found.items()}
    where = backend.put(kv_calls.positions(0))

    def halves(t: Tensor) -> dict[str, Tensor]:  # as a projection of all heads writes them
        k, v = t.view(1, tokens, 2 * heads, dim).transpose(1, 2).chunk(2, dim=1)
        return {"k": k, "v": v}

    for turn in range(3):
        made = ops.gemm_s8(*operands, out_dtype=torch.float16)
        ops.kv_append(**halves(made), **found, positions=where, rotation=64)
        where += tokens
        at = {"positions": kv_calls.positions(turn * tokens)}
        reference.kv_append(**expected | halves(y) | at)
    kv_calls.compare(found, expected)
