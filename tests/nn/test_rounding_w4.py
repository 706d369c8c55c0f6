"""4-bit weights: steps and offsets that fit, exact values, the error of the search, and GPTQ."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from smoothquant_kernels import SmoothQuantError, reference
from smoothquant_kernels.nn import rounding_w4
from smoothquant_kernels.nn.rounding_w4 import TOP, W4Weight, int4_weight, round_w4, rounded_w4
from smoothquant_kernels.ops.rotate import rotated_weight
from tests.support import cases
from tests.support.compare import assert_bitwise_equal

SIZES = ((1, 1), (3, 5), (5, 127), (17, 128), (4, 129), (9, 300))


def normal(n: int, k: int, seed: int = 0) -> Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed))


def correlated(rows: int, k: int, seed: int = 1) -> Tensor:
    """Inputs most of whose variance is in a few directions."""
    g = torch.Generator().manual_seed(seed)
    few = torch.randn(rows, max(1, k // 8), generator=g)
    return torch.randn(rows, k, generator=g) / 4 + few @ torch.randn(few.shape[1], k, generator=g)


def int8_of(made: W4Weight, k: int) -> Tensor:
    return reference.w4_weight(made.w_q4, made.w_group, k)


def represented(made: W4Weight, k: int) -> Tensor:
    return int8_of(made, k).float() * made.w_scale[:, None]


def assert_fits(made: W4Weight, n: int, k: int) -> None:
    """The contract of the format: shapes and types, and no value that a byte cannot hold."""
    groups = reference.w4_groups(k)
    assert made.w_q4.shape == (n, 64 * groups) and made.w_q4.dtype == torch.uint8
    assert made.w_group.shape == (groups, n, 2) and made.w_group.dtype == torch.int8
    assert made.w_scale.shape == (n,) and made.w_scale.dtype == torch.float32
    assert all(t.is_contiguous() for t in made)
    step, offset = made.w_group.int().unbind(-1)
    assert 0 <= step.min() and step.max() <= reference.W4_MAX
    assert offset.min() >= -128 and (offset + reference.W4_MAX * step).max() <= 127


@pytest.mark.parametrize("gptq", [False, True])
@pytest.mark.parametrize("n_k", SIZES, ids=str)
def test_every_weight_fits_the_format(n_k: tuple[int, int], gptq: bool) -> None:
    n, k = n_k
    weight = normal(n, k)
    weight[n // 2] = 0
    weight[-1, 0] = 1e30 if k > 1 else 3.0
    x = correlated(64, k)
    made = int4_weight(weight, None, 0, x.t() @ x if gptq else None)
    assert_fits(made, n, k)
    assert made.w_scale.isfinite().all()
    if not gptq:
        error = (represented(made, k) - weight).abs().amax(1)
        # Half a step of the widest group, 15 at most, and half a unit for the offset. A group may be clipped by
        # three steps in all, beyond which its squared error would grow.
        assert (error <= (15 / 2 + 0.5 + 3 * 15) * made.w_scale).all()
        assert (represented(made, k)[n // 2] == 0).all() or n // 2 == n - 1


@pytest.mark.parametrize("k", [1, 20, 128, 200, 384])
def test_representable_weights_are_reproduced_exactly(k: int) -> None:
    """Groups that use 0 and 15 and channels that reach `TOP`, with scales that are powers of two."""
    g = torch.Generator().manual_seed(k)
    n, groups = 24, reference.w4_groups(k)
    q = torch.randint(0, 16, (n, groups, 128), generator=g)
    ends = torch.randint(0, 2, (n, groups, 1), generator=g)
    q[:, :, :1], q[:, :, 1:2] = 15 * ends, 15 * (1 - ends)
    step = torch.randint(1, 13, (n, groups, 1), generator=g)
    step[::3] = 14  # 14 * 15 = 210 units, nearly all of them
    offset = -(15 * step) // 2
    values = (q * step + offset).flatten(1)[:, :k].float()
    values[:, -1] = TOP  # alone in its group, or what its group must reach
    if k % 128 != 1:
        last = values[:, (groups - 1) * 128 :]
        last[:] = torch.where(last > 0, TOP, TOP - 15 * 13)
    scale = 2.0 ** torch.randint(-20, 10, (n,), generator=g)
    made = int4_weight(values * scale[:, None], None, 0)
    assert_bitwise_equal(made.w_scale, scale)
    assert_bitwise_equal(int8_of(made, k), values.to(torch.int8))


def test_zero_and_constant_channels_are_exact() -> None:
    weight = torch.zeros(4, 200)
    weight[1], weight[2], weight[3, 7] = 0.75, -3.0, 1e-44
    made = int4_weight(weight, None, 0)
    assert made.w_scale[0] == 0 and made.w_scale[3] == 0  # subnormal scales count as zero
    expected = torch.cat([weight[:3], torch.zeros(1, 200)])
    assert torch.allclose(represented(made, 200), expected, rtol=2**-22, atol=0)
    assert int8_of(made, 200)[:3, 0].tolist() == [0, TOP, -TOP]


@pytest.mark.parametrize("size", [1e-30, 1e-3, 1e30])
def test_the_size_of_a_weight_does_not_matter(size: float) -> None:
    power = 2.0 ** round(torch.tensor(size).log2().item())
    weight = normal(6, 300)
    made, scaled = int4_weight(weight, None, 0), int4_weight(weight * power, None, 0)
    assert_bitwise_equal(scaled.w_q4, made.w_q4)
    assert_bitwise_equal(scaled.w_group, made.w_group)
    assert_bitwise_equal(scaled.w_scale, made.w_scale * power)


def smallest_error(w: Tensor) -> Tensor:
    """The least squared error of each group [N, G] of w [N, K] in units, over all steps and offsets."""
    n = len(w)
    grouped = w.view(n, -1, 128)
    least = torch.full(grouped.shape[:2], torch.inf)
    for step in range(1, 16):
        for offset in range(-128, 128 - 15 * step):
            q = ((grouped - offset) / step).round().clamp(0, 15)
            least = least.minimum((grouped - q * step - offset).square().sum(-1))
    return least


def test_the_search_is_close_to_all_steps_and_offsets() -> None:
    weight = torch.cat([normal(6, 256), normal(6, 256, 1) ** 3, normal(6, 256, 2).abs()])
    scale = weight.abs().amax(1, keepdim=True) / TOP
    made = int4_weight(weight, None, 0)
    found = ((weight / scale) - int8_of(made, 256)).view(18, 2, 128).square().sum(-1)
    best = smallest_error(weight / scale)
    assert (found >= best * (1 - 1e-4)).all()
    assert found.sum() < 1.06 * best.sum()
    plain = _min_max(weight / scale)
    assert found.sum() < 0.95 * plain
    quick, quick_scale = rounded_w4(weight)
    assert_bitwise_equal(quick_scale, made.w_scale)
    assert found.sum() < (quick - weight / scale).square().sum() < 1.2 * found.sum()


def _min_max(units: Tensor) -> Tensor:
    """The error of steps that cover the range, without a search."""
    grouped = units.view(len(units), -1, 128)
    low, high = grouped.aminmax(dim=-1, keepdim=True)
    step = ((high - low) / 15).ceil()
    offset = low.round()
    return (
        (((grouped - offset) / step).round().clamp(0, 15) * step + offset - grouped).square().sum()
    )


def test_mean_squares_decide_which_channels_count() -> None:
    weight, squares = normal(32, 256) ** 3, torch.ones(256)
    squares[::16] = 400.0
    made, plain = int4_weight(weight, None, 0, squares), int4_weight(weight, None, 0)

    def error(made: W4Weight) -> Tensor:
        return ((represented(made, 256) - weight).square() * squares).sum()

    assert error(made) < 0.8 * error(plain)
    for same in (torch.ones(256), torch.zeros(256), torch.full((256,), 7.0)):
        for got, wanted in zip(int4_weight(weight, None, 0, same), plain, strict=True):
            assert_bitwise_equal(got, wanted)


@pytest.mark.parametrize("rotation", [0, 16])
def test_factors_and_rotation_come_first(rotation: int) -> None:
    weight, smooth = normal(7, 160), cases.inverse_smooth(160)
    x = correlated(300, 160)
    moments = x.t() @ x
    w = rotated_weight(weight * smooth, rotation)
    for more in (None, moments):
        found = int4_weight(weight, smooth, rotation, more)
        for got, wanted in zip(found, int4_weight(w, None, 0, more), strict=True):
            assert_bitwise_equal(got, wanted)


def test_a_large_weight_in_parts_has_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = normal(40, 300).bfloat16()
    whole = int4_weight(weight, None, 0)
    monkeypatch.setattr("smoothquant_kernels.nn.float_linear._PART", 300 * 7)
    monkeypatch.setattr(rounding_w4, "_AT_ONCE", 384 * 3)
    for got, wanted in zip(int4_weight(weight, None, 0), whole, strict=True):
        assert_bitwise_equal(got, wanted)


# --- GPTQ -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [128, 300])
def test_gptq_reduces_the_error_of_the_output(k: int) -> None:
    """On inputs that it has not seen, too."""
    x, w = correlated(1200, k), normal(48, k)
    seen, unseen = x[:900], x[900:]

    def error(made: W4Weight, x: Tensor) -> float:
        return float((x @ (represented(made, k) - w).t()).norm() / (x @ w.t()).norm())

    nearest, gptq = int4_weight(w, None, 0), round_w4(w, seen.t() @ seen)
    assert error(gptq, seen) < 0.7 * error(nearest, seen)
    assert error(gptq, unseen) < 0.8 * error(nearest, unseen)


def test_gptq_on_independent_channels_is_the_nearest() -> None:
    w = normal(9, 256)
    for moments in (torch.eye(256), 1e-12 * torch.eye(256), torch.zeros(256, 256)):
        for got, wanted in zip(round_w4(w, moments), int4_weight(w, None, 0), strict=True):
            assert_bitwise_equal(got, wanted)


def test_errors_reach_the_groups_after() -> None:
    """Two equal channels in different groups: the second takes up what the first lost."""
    w = normal(64, 256)
    moments = torch.eye(256)
    moments[0, 255] = moments[255, 0] = 0.999

    def both(made: W4Weight) -> float:
        return float((represented(made, 256) - w)[:, [0, 255]].sum(1).norm())

    assert both(round_w4(w, moments)) < 0.75 * both(int4_weight(w, None, 0))


def test_inputs_of_too_few_tokens() -> None:
    x = correlated(3, 200)
    made = round_w4(normal(5, 200), x.t() @ x)
    assert_fits(made, 5, 200)


@pytest.mark.parametrize(
    ("moments", "said"),
    [
        (torch.eye(5), r"shape \[6, 6\]; got \[5, 5\]"),
        (torch.full((6, 6), torch.nan), "not all finite"),
        (torch.ones(5), r"or \[6\].*got \[5\]"),
        (torch.full((6,), torch.inf), "not all finite"),
        (torch.full((6,), -1.0), "negative"),
    ],
    ids=str,
)
def test_wrong_moments_are_refused(moments: Tensor, said: str) -> None:
    with pytest.raises(SmoothQuantError, match=said):
        int4_weight(normal(4, 6), None, 0, moments)


def test_a_weight_beyond_float32_is_refused() -> None:
    with pytest.raises(SmoothQuantError, match="too large for float32"):
        int4_weight(torch.full((2, 3), 3e38), torch.full((3,), 10.0), 0)
