"""The CPU kernels on oneDNN equal the reference bit for bit, in every mode, for every layout and thread count."""

from __future__ import annotations

import gc
import os
import weakref
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from smoothquant_kernels import SmoothQuantError, ops, reference
from smoothquant_kernels.backends import onednn
from tests.support import cases
from tests.support.compare import assert_all_bitwise_equal, assert_bitwise_equal

#: Whether oneDNN uses AMX here, which rounds uint8 sums that leave the exact integers of float32.
AMX = not onednn._is_exact("onednn_vnni") and onednn._is_exact("onednn_amx")

pytestmark = pytest.mark.usefixtures("in_python")


@pytest.fixture(params=onednn.MODES)
def mode(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each way to multiply, not only the one that this processor would choose."""
    if request.param != "onednn_float" and not hasattr(torch.ops.onednn, "qlinear_pointwise"):
        pytest.skip("this torch has no oneDNN")
    if request.param == "onednn_split" and not onednn._is_exact("onednn_split"):
        pytest.skip("two stacked operands are not exact on this processor")
    if request.param in onednn._WHOLE and AMX != (request.param == "onednn_amx"):
        pytest.skip("the other one of onednn_vnni and onednn_amx is this processor's")
    monkeypatch.setattr(onednn, "gemm_mode", lambda: request.param)
    return str(request.param)


def largest_weight(mode: str) -> int:
    """The largest |w| that this processor multiplies exactly in a mode.

    Without VNNI, oneDNN adds pairs of u8 x s8 products in 16 bits, which cannot saturate if |w| <= 64:
    255 * 64 * 2 < 2^15. So the mode is tested on any processor, and over the full range with VNNI.
    """
    return 64 if mode == "onednn_vnni" and not onednn._is_exact("onednn_vnni") else 128


# --- gemm -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [*cases.GEMM_SHAPES, (64, 200, 300), (2, 9, 20_000)], ids=str)
@pytest.mark.parametrize("per_token", [True, False])
@pytest.mark.parametrize("per_channel", [True, False])
def test_gemm(mode: str, shape: tuple[int, int, int], per_token: bool, per_channel: bool) -> None:
    op = cases.gemm_operands(
        *shape, per_token=per_token, per_channel=per_channel, largest_weight=largest_weight(mode)
    )
    for bias in (None, op.bias, op.bias.half()):
        for residual in (None, op.residual, op.residual.bfloat16()):
            for dtype in cases.FLOATS:
                found = ops.gemm_s8(*op[:4], bias=bias, residual=residual, out_dtype=dtype)
                expected = reference.gemm_s8(*op[:4], bias, residual, dtype)
                assert_bitwise_equal(found, expected, f"{dtype}")
        for relu in (False, True):
            args = (*op[:4], torch.tensor([0.02]))
            found = ops.gemm_s8_requant(*args, bias=bias, relu=relu)
            assert_bitwise_equal(found, reference.gemm_s8_requant(*args, bias, relu), "requant")


def test_sums_beyond_the_precision_of_float32(mode: str) -> None:
    k = reference.MAX_K
    op = cases.gemm_operands(3, 4, k, largest_weight=largest_weight(mode))
    op.x_q[0] = 127
    op.w_q[0, ::3] = 13  # an odd sum of some 10^9
    acc = op.x_q.long() @ op.w_q.long().T
    assert bool((acc.abs() > 2**28).any()) and not torch.equal(acc.float().long(), acc)
    if mode not in onednn._WHOLE:
        assert len(onednn._chunk_bounds(op.w_q)) > 10
    for bias in (None, op.bias):
        found = ops.gemm_s8(*op[:4], bias=bias, out_dtype=torch.float32)
        assert_bitwise_equal(found, reference.gemm_s8(*op[:4], bias, out_dtype=torch.float32))


@pytest.mark.parametrize("extra", [0, 1])
def test_the_largest_k_of_vnni(mode: str, extra: int) -> None:
    """uint8 operands are at most 255, so no sum overflows int32 up to this K. Above it, `onednn_split` takes over."""
    k = onednn._VNNI_MAX_K + extra
    assert (255 * 128 * k < 2**31) == (extra == 0)
    limit = largest_weight(mode)
    x_q, w_q = (
        torch.full((2, k), 127, dtype=torch.int8),
        torch.full((2, k), -limit, dtype=torch.int8),
    )
    x_q[1] = -128
    w_q[1] = min(limit, 127)
    args = (x_q, w_q, torch.ones(2), torch.ones(2))
    found = ops.gemm_s8(*args, out_dtype=torch.float32)
    assert_bitwise_equal(found, reference.gemm_s8(*args, out_dtype=torch.float32))
    packed = onednn._packed_weight(w_q)
    assert packed.mode == ("onednn_split" if mode in onednn._WHOLE and extra else mode)
    assert onednn._packed_weight(w_q) is packed


def test_slices_of_k_keep_partial_sums_exact() -> None:
    for k in (1, 1023, 1025, 5000):
        w_q = cases.random_int8(3, k)
        w_q[1] = -128
        bounds = onednn._chunk_bounds(w_q)
        assert [b for _, b in bounds[:-1]] == [a for a, _ in bounds[1:]], "no gap, no overlap"
        assert bounds[0][0] == 0 and bounds[-1][1] == k
        for start, stop in bounds:
            assert int(w_q[:, start:stop].long().abs().sum(1).max()) * 128 <= 2**24
    assert len(onednn._chunk_bounds(torch.ones(2, 100_000, dtype=torch.int8))) == 1, (
        "no more than needed"
    )


@pytest.mark.parametrize("m", [1, 3, 4, 9, 17, 257])
def test_weights_of_one_sign(mode: str, m: int) -> None:
    """x + 128 times such a weight leaves the exact integers of float32, although the product itself does not."""
    k, most = 4608, largest_weight(mode)
    op = cases.gemm_operands(m, 35, k, largest_weight=most)
    op.w_q[0], op.w_q[1] = min(most, 127), -most
    exact = op.x_q.double() @ op.w_q.double().T
    assert 128 * k * min(most, 127) > 2**24
    ones = torch.ones(m), torch.ones(35)
    found = ops.gemm_s8(op.x_q, op.w_q, *ones, out_dtype=torch.float32)
    assert_bitwise_equal(found, exact.float())


def test_zero_sums_are_plus_zero(mode: str) -> None:
    for k in (1, 3):
        x_q, w_q = torch.zeros(2, k, dtype=torch.int8), torch.full((3, k), -5, dtype=torch.int8)
        y = ops.gemm_s8(x_q, w_q, torch.ones(2), torch.ones(3), out_dtype=torch.float32)
        assert_bitwise_equal(y, torch.zeros(2, 3))


def test_any_layout_of_the_operands(mode: str) -> None:
    op = cases.gemm_operands(12, 10, 36, largest_weight=largest_weight(mode))
    expected = reference.gemm_s8(*op[:4], op.bias, op.residual)

    def strided(t: Tensor) -> Tensor:
        wide = torch.zeros(*t.shape[:-1], 2 * t.shape[-1] + 1, dtype=t.dtype)
        wide[..., 1::2] = t
        return wide[..., 1::2]  # every second element, from an odd address

    def transposed(t: Tensor) -> Tensor:
        return t.t().contiguous().t() if t.dim() == 2 else t.flip(0).flip(0)

    for layout in (strided, transposed):
        moved = [layout(t) for t in op]
        found = ops.gemm_s8(*moved[:4], bias=moved[4], residual=moved[5])
        assert_bitwise_equal(found, expected, layout.__name__)
    deep = ops.gemm_s8(
        op.x_q.view(2, 3, 2, 36), *op[1:4], bias=op.bias, residual=op.residual.view(2, 3, 2, 10)
    )
    assert_bitwise_equal(deep, expected.view(2, 3, 2, 10), "leading dimensions")
    vector = ops.gemm_s8(op.x_q[0], op.w_q, op.x_scale[:1], op.w_scale)
    assert vector.shape == (10,)
    expanded = ops.gemm_s8(op.x_q[:1].expand(12, 36), op.w_q, op.x_scale[:1].expand(12), op.w_scale)
    assert_bitwise_equal(expanded, vector.expand(12, 10).contiguous(), "expanded")


def test_the_output_is_rounded_to_nearest_even_once() -> None:
    """Values beyond float16's range become Inf, but 65519.99 still rounds to its largest number."""
    x_q = torch.tensor([[127, 1]], dtype=torch.int8)
    w_q = torch.tensor([[100, 0], [-100, 0], [100, 0], [0, 1], [0, 1], [0, 1]], dtype=torch.int8)
    wanted = [65520.0, -65520.0, 65519.0, 2049.0, 2051.0, 1 + 3 * 2.0**-9]
    bias = torch.tensor(wanted, dtype=torch.float64) - (x_q.double() @ w_q.double().T)[0]
    args = (x_q, w_q, torch.ones(1), torch.ones(1))
    y = ops.gemm_s8(*args, bias=bias.float(), out_dtype=torch.float32)
    assert y[0].tolist() == wanted
    half = ops.gemm_s8(*args, bias=bias.float(), out_dtype=torch.float16)
    with np.errstate(over="ignore"):
        assert half[0].tolist() == np.array(wanted, dtype=np.float16).tolist()
    assert half[0, :5].tolist() == [torch.inf, -torch.inf, 65504.0, 2048.0, 2052.0]
    brain = ops.gemm_s8(*args, bias=bias.float(), out_dtype=torch.bfloat16)
    assert brain[0, 5].item() == 1.0 + 2**-7  # 1 + 0.75 * 2^-7
    huge = ops.gemm_s8(
        x_q, w_q, torch.tensor([3e38]), torch.tensor([1.0]), out_dtype=torch.bfloat16
    )
    assert huge[0, 0].item() == torch.inf


@pytest.mark.parametrize("shape", [(1, 1, 8), (5, 67, 8), (33, 1, 8), (7, 130, 64)], ids=str)
def test_with_and_without_a_fused_addcmul(
    shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    op = cases.gemm_operands(*shape)
    product = ops.gemm_s8(*op[:4], out_dtype=torch.float32)
    bias = -product[0] * 1.0000001  # cancels in the first row, where an unfused result differs
    expected = reference.gemm_s8(*op[:4], bias, out_dtype=torch.float32)
    assert_bitwise_equal(ops.gemm_s8(*op[:4], bias=bias, out_dtype=torch.float32), expected)
    assert not torch.equal(product + bias, expected)
    monkeypatch.setattr(onednn, "_addcmul_is_fused", lambda: False)
    assert_bitwise_equal(ops.gemm_s8(*op[:4], bias=bias, out_dtype=torch.float32), expected)


# --- which mode -------------------------------------------------------------------------------------


@pytest.fixture
def fresh_mode(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Makes the test choose the mode anew. A process otherwise chooses it once."""
    monkeypatch.delenv("SMOOTHQUANT_KERNELS_CPU", raising=False)
    onednn.gemm_mode.cache_clear()
    onednn._addcmul_is_fused.cache_clear()
    yield
    onednn.gemm_mode.cache_clear()
    onednn._addcmul_is_fused.cache_clear()


@pytest.mark.usefixtures("fresh_mode")
def test_the_fastest_exact_mode_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = [m for m in onednn.MODES[:-1] if onednn._is_exact(m)]
    assert onednn.gemm_mode() == [*exact, "onednn_float"][0]
    original = onednn._qlinear
    monkeypatch.setattr(onednn, "_qlinear", lambda *args: original(*args) * 1.0001)
    onednn.gemm_mode.cache_clear()
    assert onednn.gemm_mode() == "onednn_float", "a product that is off by a little is not used"


@pytest.mark.usefixtures("fresh_mode")
@pytest.mark.parametrize("wanted", ["auto", "avx2", "onednn", *onednn.MODES])
def test_the_environment_can_force_a_slower_mode(
    wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(os.environ, "SMOOTHQUANT_KERNELS_CPU", wanted)
    first = onednn.MODES.index(wanted) if wanted in onednn.MODES else 0
    assert onednn.gemm_mode() in onednn.MODES[first:]


@pytest.mark.usefixtures("fresh_mode")
def test_an_unknown_mode_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "SMOOTHQUANT_KERNELS_CPU", "fast")
    with pytest.raises(
        SmoothQuantError, match=r"must be one of auto, amx, .*onednn_float; got 'fast'"
    ):
        onednn.gemm_mode()


# --- the packed weights -----------------------------------------------------------------------------


def assert_equals_reference(op: cases.Gemm, w_q: Tensor) -> None:
    args = (op.x_q, w_q, op.x_scale, op.w_scale)
    assert_bitwise_equal(ops.gemm_s8(*args), reference.gemm_s8(*args))


def test_a_weight_is_packed_once_until_it_is_written_to(mode: str, packs: list[int]) -> None:
    op = cases.gemm_operands(5, 6, 7, largest_weight=64)
    w_q = op.w_q
    writes = (
        lambda: None,
        lambda: w_q.fill_(3),
        lambda: w_q[2].neg_(),  # through a view
        lambda: w_q.copy_(cases.random_int8(6, 7, seed=9, low=-64, high=64)),
        lambda: setattr(w_q, "data", cases.random_int8(6, 7, seed=8, low=-64, high=64)),
    )
    for count, write in enumerate(writes, start=1):
        write()
        assert_equals_reference(op, w_q)
        assert_equals_reference(op, w_q)
        assert len(packs) == count


def test_the_cache_does_not_keep_a_weight_alive(mode: str) -> None:
    gc.collect()
    before = len(onednn._PACKED)
    op = cases.gemm_operands(2, 3, 4, largest_weight=64)
    w_q = op.w_q.clone()
    assert_equals_reference(op, w_q)
    assert len(onednn._PACKED) == before + 1
    alive = weakref.ref(w_q)
    del w_q
    gc.collect()
    assert alive() is None and len(onednn._PACKED) == before


def test_another_mode_packs_again(monkeypatch: pytest.MonkeyPatch) -> None:
    op = cases.gemm_operands(2, 3, 4)
    for mode in ("onednn_float", "onednn_split", "onednn_float"):
        if mode == "onednn_float" or onednn._is_exact(mode):
            monkeypatch.setattr(onednn, "gemm_mode", lambda mode=mode: mode)
            assert_equals_reference(op, op.w_q)


def test_inference_tensors(mode: str) -> None:
    with torch.inference_mode():
        op = cases.gemm_operands(2, 3, 4, largest_weight=64)
        assert_equals_reference(op, op.w_q)
        op.w_q.neg_()  # inference tensors have no version, so a cache could not notice this
        assert_equals_reference(op, op.w_q)
    assert_equals_reference(op, op.w_q)
    plain = cases.gemm_operands(2, 3, 4, largest_weight=64)
    with torch.inference_mode():
        assert_equals_reference(plain, plain.w_q)
        plain.w_q.neg_()
        assert_equals_reference(plain, plain.w_q)


# --- threads, defaults and chunks -------------------------------------------------------------------


def run_everything(mode: str) -> list[Tensor]:
    op = cases.gemm_operands(300, 130, 257, largest_weight=largest_weight(mode))
    x = cases.activations(300, 513)
    weight = cases.inverse_smooth(513)
    return [
        ops.gemm_s8(*op[:4], bias=op.bias, residual=op.residual),
        ops.gemm_s8_requant(*op[:4], torch.tensor([0.02]), relu=True),
        *ops.quantize(x, inv_smooth=weight),
        *ops.quantize(x, granularity="tensor"),
        *ops.rms_norm_quantize(x, weight, 1e-6, residual=x),
        *ops.act_quantize(x, "gelu"),
    ]


def test_the_thread_count_does_not_change_the_results(mode: str) -> None:
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = run_everything(mode)
        torch.set_num_threads(2)
        found = run_everything(mode)
    finally:
        torch.set_num_threads(threads)
    assert_all_bitwise_equal(found, expected)


@pytest.mark.usefixtures("fresh_mode")
def test_the_callers_defaults_do_not_change_the_results() -> None:
    op = cases.gemm_operands(3, 4, 50, per_channel=False)
    x, empty = cases.activations(3, 5), cases.activations(0, 5)

    def results() -> list[Tensor]:
        onednn.gemm_mode.cache_clear()
        onednn._addcmul_is_fused.cache_clear()
        chosen.append(onednn.gemm_mode())
        y = ops.gemm_s8(op.x_q, op.w_q.clone(), *op[2:4], bias=op.bias)
        none = ops.gemm_s8(op.x_q[:0], op.w_q, op.x_scale[:0], op.w_scale)
        return [y, none, *ops.quantize(x), *ops.quantize(empty, granularity="tensor")]

    chosen: list[str] = []
    expected = results()
    try:
        torch.set_default_dtype(torch.bfloat16)
        assert_all_bitwise_equal(results(), expected, "default dtype")
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.device("meta"):
        assert_all_bitwise_equal(results(), expected, "default device")
    with torch.autocast("cpu", torch.bfloat16):
        assert_all_bitwise_equal(results(), expected, "autocast")
    assert len(set(chosen)) == 1, f"another mode was chosen: {chosen}"


def test_autocast_does_not_change_the_results(mode: str) -> None:
    expected = run_everything(mode)
    with torch.autocast("cpu", torch.bfloat16):
        assert_all_bitwise_equal(run_everything(mode), expected)


def test_gemm_in_chunks_equals_the_whole_gemm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are multiplied in chunks, here of 128. The last one is shorter, and a scalar scale has no rows to slice."""
    generator = torch.Generator().manual_seed(3)
    x_q = torch.randint(-127, 128, (3, 100, 40), generator=generator, dtype=torch.int8)
    w_q = torch.randint(-127, 128, (24, 40), generator=generator, dtype=torch.int8)
    w_scale, bias = torch.rand(24, generator=generator), torch.randn(24, generator=generator)
    residual = torch.randn(3, 100, 24, generator=generator)
    monkeypatch.setattr(onednn, "_CHUNK_RESULTS", 1)
    for x_scale in (torch.rand(300, generator=generator), torch.rand(1, generator=generator)):
        for extra in (None, residual):
            args = (x_q, w_q, x_scale, w_scale)
            y = onednn.gemm_s8(*args, bias=bias, residual=extra, out_dtype=torch.float16)
            assert_bitwise_equal(y, reference.gemm_s8(*args, bias, extra, torch.float16))
