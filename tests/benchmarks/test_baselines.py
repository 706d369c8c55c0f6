"""What `gemm_s8` is compared with computes the same product, or says why it cannot, or is refused."""

from __future__ import annotations

import importlib.util
import sys
import types
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.lib import baselines, cases, real_data
from benchmarks.lib.baselines import BY_NAME, FP8, UNITS
from benchmarks.lib.cases import Case, Data, Expected, Operands
from benchmarks.lib.shapes import TOY_LAYERS, Layer
from smoothquant_kernels import reference
from tests.benchmarks.programs import python

CPU = torch.device("cpu")
WIDE = Layer("toy", "up", 96, 2048)
DEEP = Layer("toy", "down", 64, 4096)


def problem(case: Case) -> tuple[Operands, Expected]:
    generator = cases.generator_of(case, CPU)
    operands = cases.make_operands(case, generator)
    return operands, Expected(case, operands, generator)


def emulated_fp8(a: Operands) -> Tensor:
    x, w, x_scale, w_scale = baselines.to_fp8(a)
    assert x_scale.shape == (len(x), 1) and w_scale.shape == (1, len(w))
    return ((x.float() @ w.float().t()) * x_scale * w_scale).to(torch.bfloat16)


FLOATS = {
    "fp16": lambda a: BY_NAME["fp16"].calls([a])[0](),
    "bf16": lambda a: BY_NAME["bf16"].calls([a])[0](),
    "fp8": emulated_fp8,
}


@pytest.mark.parametrize("m", [1, 64])
@pytest.mark.parametrize("data", ["random", "real"])
@pytest.mark.parametrize("layer", [WIDE, DEEP], ids=str)
@pytest.mark.parametrize("name", FLOATS)
def test_a_float_product_is_accepted_and_no_other(
    name: str, layer: Layer, data: Data, m: int
) -> None:
    case = Case(layer, m, data)
    operands, expected = problem(case)
    wrong, y = BY_NAME[name].wrong, FLOATS[name](operands)
    assert wrong(expected, operands, y) == ""
    for other in (y * 0, y * 1.5, y.flip(1), y * torch.nan):
        assert "of its norm off" in wrong(expected, operands, other)
    if m > 1:  # the last half of the tokens was never written
        half = y * (torch.arange(m) < m // 2)[:, None]
        assert "of its norm off" in wrong(expected, operands, half)
    assert "y is torch" in wrong(expected, operands, y[:, 1:])


def test_the_float_operands_are_the_int8_ones_dequantized() -> None:
    operands, _ = problem(Case(WIDE, 5, "real"))
    for dtype in (torch.float16, torch.bfloat16):
        x, w = baselines.float_operands(operands, dtype)
        assert torch.equal(x, (operands.x_q.float() * operands.x_scale[:, None]).to(dtype))
        assert torch.equal(w, (operands.w_q.float() * operands.w_scale[:, None]).to(dtype))
    x8, _, x_scale, _ = baselines.to_fp8(operands)
    assert x8.dtype == FP8 and bool((x8.float().abs().amax(1) == torch.finfo(FP8).max).all())
    # e4m3 is normal from 2**-6 on, that is from 1/28672 of a row's maximum: below any int8 but 0.
    exact = operands.x_q.float() * operands.x_scale[:, None]
    assert bool(((x8.float() * x_scale - exact).abs() <= 1.001 * UNITS[FP8] * exact.abs()).all())


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize(("m", "n", "k"), [(1, 96, 2048), (70, 33, 300)])
def test_weights_of_4_bits_are_checked_as_what_they_are(
    monkeypatch: pytest.MonkeyPatch, sampled: bool, m: int, n: int, k: int
) -> None:
    """Another product of the same sizes, whose weights are int8 and take all values and steps."""
    if sampled:
        monkeypatch.setattr(cases, "FULL_CHECK", 0)
    operands, expected = problem(Case(Layer("toy", "up", n, k), m))
    w_q4, w_group = baselines.w4_weight(operands)
    assert len(reference.unpack_w4(w_q4, k).unique()) == 16
    assert w_group[..., 0].unique().tolist() == list(range(1, 16))
    step, offset = w_group.int().unbind(-1)
    assert int(offset.min()) >= -128 and int((15 * step + offset).max()) <= 127
    w4 = BY_NAME["w4a8"]
    assert w4.refusal(expected.case, CPU) == "" and not w4.usual
    y = w4.calls([operands])[0]()
    assert w4.wrong(expected, operands, y) == ""
    assert "elements differ" in w4.wrong(expected, operands, y + 1)
    assert "elements differ" in w4.wrong(expected, operands, cases.dispatched(operands))
    assert "y is torch" in w4.wrong(expected, operands, y[:, 1:])


def test_one_step_is_allowed_where_the_scales_come_in_another_order() -> None:
    case = Case(TOY_LAYERS[0], 33)
    a, expected = problem(case)
    acc = (a.x_q.double() @ a.w_q.double().t()).float()
    other = (acc * a.x_scale[:, None] * a.w_scale).half()
    assert baselines.beyond_one_step(expected, a, other) == ""
    y = cases.dispatched(a)
    for steps, accepted in ((1, True), (2, False), (-2, False)):
        moved = y.clone()
        moved.view(torch.int16)[3, 4] += steps
        assert (baselines.beyond_one_step(expected, a, moved) == "") == accepted
    assert "1 of 3168 elements" in baselines.beyond_one_step(expected, a, moved)
    moved[3, 4] = torch.nan
    assert "1 of 3168 elements" in baselines.beyond_one_step(expected, a, moved)
    zeros = torch.tensor([0.0, -0.0, 6e-8, -6e-8], dtype=torch.float16)
    assert baselines._step(zeros).tolist() == [0, 0, 1, -1]


def test_every_baseline_that_cannot_run_here_says_why() -> None:
    for case in (Case(layer, m) for layer in TOY_LAYERS for m in (1, 32)):
        for baseline in baselines.ALL:
            reason = baseline.refusal(case, CPU)
            assert bool(reason) or baseline.name in ("fp16", "bf16", "int_mm", "triton", "w4a8")
    assert "8.9" in BY_NAME["fp8"].refusal(Case(TOY_LAYERS[0], 32), CPU)


def test_gpus_and_shapes_without_fp8_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu: Any = types.SimpleNamespace(type="cuda")
    found = {(8, 0): "compute capability", (8, 9): "", (9, 0): ""}
    for capability, reason in found.items():
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, c=capability: c)
        said = BY_NAME["fp8"].refusal(Case(TOY_LAYERS[0], 32), gpu)
        assert reason in said and bool(said) == bool(reason)
    assert "multiples of 16" in BY_NAME["fp8"].refusal(Case(TOY_LAYERS[2], 32), gpu)


@pytest.mark.parametrize(
    ("name", "module", "function"),
    [("vllm", "vllm._custom_ops", "cutlass_scaled_mm"), ("sgl", "sgl_kernel", "int8_scaled_mm")],
)
def test_other_libraries_get_a_column_major_weight_and_columns_of_scales(
    monkeypatch: pytest.MonkeyPatch, name: str, module: str, function: str
) -> None:
    def product(
        a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, out_dtype: torch.dtype
    ) -> Tensor:
        assert b.shape == (64, 96) and b.stride(0) == 1 and a.is_contiguous()
        assert scale_a.shape == (17, 1) and scale_b.shape == (96, 1)
        return reference.gemm_s8(a, b.t(), scale_a.view(-1), scale_b.view(-1), out_dtype=out_dtype)

    pretended = types.ModuleType(module)
    setattr(pretended, function, product)
    monkeypatch.setitem(sys.modules, module.split(".")[0], types.ModuleType(module.split(".")[0]))
    monkeypatch.setitem(sys.modules, module, pretended)
    monkeypatch.setattr(baselines, "missing", baselines.missing.__wrapped__)
    assert baselines.missing(module, function) == ""
    case = Case(TOY_LAYERS[0], 17)
    operands, expected = problem(case)
    (call,) = BY_NAME[name].calls([operands])
    assert BY_NAME[name].wrong(expected, operands, call()) == ""
    assert "has no attribute" in baselines.missing(module, "gone")


TRITON = """
import torch
from benchmarks.lib import triton_int8
from smoothquant_kernels import reference
torch.manual_seed(0)
for m, n, k, config in (
    (5, 70, 300, triton_int8.Config(16, 32, 64, 4, 4, 3)),
    (1, 96, 256, triton_int8.Config(16, 32, 64, 1, 4, 3)),
    (40, 40, 23, triton_int8.Config(32, 64, 128, 1, 4, 3)),
):
    q = [torch.randint(-127, 128, (size, k), dtype=torch.int8) for size in (m, n)]
    a = (*q, torch.rand(m) * 0.02, torch.rand(n) * 0.01)
    assert torch.equal(triton_int8.scaled_mm(a, config, torch.float16), reference.gemm_s8(*a)), (m, n, k)
for m in (1, 16, 17, 64, 65, 512, 513, 8192):
    assert len(triton_int8.configs(m, 4096)) >= 6
assert not any(c.splits > 1 and c.k * c.splits > 512 for c in triton_int8.configs(1, 1024))
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_the_triton_kernel_is_the_specification() -> None:
    done = python("-c", TRITON, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr


def test_the_recording_is_small_and_of_a_quantized_model() -> None:
    assert real_data.FILE.stat().st_size <= 200_000
    found = real_data.recorded(CPU)
    parts = ("x_q", "x_scale", "w_q", "w_scale")
    assert set(found) == {f"{site}.{part}" for site in real_data.SITES for part in parts}
    for site, (_, rows) in real_data.SITES.items():
        for part in ("x", "w"):
            q, scale = found[f"{site}.{part}_q"], found[f"{site}.{part}_scale"]
            assert q.dtype == torch.int8 and q.shape[0] == rows == len(scale)
            assert q.shape[1] % real_data.BLOCK == 0 and int(q.min()) >= -127
            # Symmetric per row: each has its maximum. Real values are mostly small: random ones have 64 on average.
            assert bool((q.int().abs().amax(1) == 127).all()) and bool((scale > 0).all())
            assert float(q.float().abs().mean()) < 40


@pytest.mark.parametrize("site", real_data.SITES)
def test_drawn_operands_keep_channels_and_tokens(site: str) -> None:
    m, n, block = 100, 70, real_data.BLOCK
    found = real_data.recorded(CPU)
    channels = found[f"{site}.x_q"].shape[1]
    k = 2 * channels + 23
    x_q, w_q, x_scale, w_scale = real_data.draw(m, n, k, site, torch.Generator().manual_seed(0))
    assert x_q.shape == (m, k) and w_q.shape == (n, k)
    assert x_q.is_contiguous() and w_q.is_contiguous()
    assert x_scale.shape == (m,) and w_scale.shape == (n,)
    used = []
    for start in range(0, 2 * channels, block):
        for drawn, part in ((x_q, "x_q"), (w_q, "w_q")):
            blocks = found[f"{site}.{part}"].unflatten(1, (-1, block))  # rows, blocks, channels
            piece = drawn[:, start : start + block]
            ((row, which),) = (blocks == piece[0]).all(-1).nonzero().tolist()
            rows = (row + torch.arange(len(piece))) % len(blocks)
            assert torch.equal(blocks[rows, which], piece)
            used.append(which)
    assert used[::2] == used[1::2]  # x's channels beside their own of w
    assert sorted(used[::2]) == sorted([*range(channels // block)] * 2)


def test_sums_of_the_longest_k_stay_within_float16() -> None:
    for name in ("up", "down"):
        case = Case(Layer("toy", name, 32, 57344), 32, "real")
        operands, _ = problem(case)
        assert bool(cases.dispatched(operands).isfinite().all())
    one, two = (cases.make_operands(case, cases.generator_of(case, CPU)) for _ in range(2))
    assert torch.equal(one.x_q, two.x_q) and torch.equal(one.w_q, two.w_q)
