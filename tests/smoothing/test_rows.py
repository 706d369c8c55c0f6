"""The tokens that calibration keeps, and the range of rotated inputs that comes from them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from smoothquant_kernels import SmoothQuantConfig, SmoothQuantError, reference
from smoothquant_kernels.smoothing.rows import KEPT, Rows, rotated_maxima
from smoothquant_kernels.smoothing.statistics import ActivationStatistics
from tests.support import cases
from tests.support.compare import assert_bitwise_equal

K = 48


def tokens(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, K, generator=cases.generator(seed))


def kept(*parts: Tensor, rotation: int = 16) -> Rows:
    absmax, rows = torch.zeros(K), Rows.none(parts[0])
    for part in parts:
        absmax = absmax.maximum(part.abs().amax(0).float())
        rows = rows.with_more(part, absmax, rotation)
    return rows


def test_maxima_are_those_of_the_quantizer() -> None:
    x, s = cases.activations(9, K, torch.bfloat16), cases.inverse_smooth(K)
    for smooth in (None, s):
        for rotation in (0, 16):
            v = x.float() if smooth is None else x.float() * (1.0 / smooth)
            exact = reference.rotate(v, rotation).abs().amax(1)
            found = rotated_maxima(x, None if smooth is None else 1.0 / smooth, rotation)
            # Divided by 127 and multiplied again: two roundings.
            assert torch.allclose(found, exact, rtol=2.1 * 2.0**-24, atol=0.0)


def test_the_first_tokens_and_the_largest_later_ones_are_kept() -> None:
    x = tokens(300)
    x[200] *= 50  # a massive token
    x[70, 5] = 400.0  # an outlier in one channel, which a rotation by 16 divides by 4
    for parts in ([x], [x[:10], x[10:50], x[50:]], list(x.split(7))):
        rows = kept(*parts)
        assert_bitwise_equal(rows.first, x[:KEPT])
        assert len(rows.largest) == KEPT
        assert any(torch.equal(row, x[200]) for row in rows.largest)
        assert any(torch.equal(row, x[70]) for row in rows.largest)
        everything = rotated_maxima(x, None, 16)
        assert float(rows.maxima(None, 16).max()) == float(everything.max())
        assert_bitwise_equal(rows.first_maxima(None, 16), everything[:KEPT])


def test_few_tokens_are_all_kept() -> None:
    x = tokens(KEPT + 3)
    assert_bitwise_equal(kept(x[:5], x[5:]).both(), x)
    assert_bitwise_equal(kept(x[:5]).both(), x[:5])
    assert kept(x[:5]).shape() == {"first": 5, "rows": 5, "dtype": "float32"}


def test_later_parts_do_not_change_what_was_kept() -> None:
    """The rows are copies: a batch's activations are not kept alive, and may be overwritten."""
    x = tokens(100)
    rows = kept(x)
    before = rows.both()
    x.zero_()
    assert_bitwise_equal(rows.both(), before)


def test_the_range_is_near_that_of_all_tokens_for_any_factors() -> None:
    """The provisional factors choose the tokens. Other factors find nearly the same range in them."""
    x = torch.cat([cases.activations(250, K, seed=s) for s in range(4)])
    w = torch.rand(K, generator=cases.generator(9)) + 0.1
    for alpha in (0.3, 0.5, 0.7, 0.9):
        s = reference.smoothing_factors(x.abs().amax(0), w, alpha)
        for rotation in (4, 16):
            rows = kept(*x.split(100), rotation=rotation)
            everything = float(rotated_maxima(x, 1.0 / s, rotation).max())
            assert 0.85 * everything <= float(rows.maxima(s, rotation).max()) <= everything


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_types(dtype: torch.dtype) -> None:
    rows = kept(tokens(40).to(dtype))
    stored = torch.float32 if dtype == torch.float64 else dtype
    assert rows.first.dtype == rows.largest.dtype == stored and rows.fits(K) and not rows.fits(7)


def test_channels_that_are_always_zero() -> None:
    x = tokens(100)
    x[:, :10] = 0.0
    assert bool(kept(x).maxima(None, 16).isfinite().all())


def test_an_odd_number_of_channels_has_no_rotation_but_rows() -> None:
    x = torch.randn(100, 7, generator=cases.generator(3))
    absmax = x.abs().amax(0)
    assert Rows.none(x).with_more(x, absmax, 0).both().shape == (2 * KEPT, 7)


def test_ranges_and_peaks_of_a_layer() -> None:
    statistics = ActivationStatistics()
    x = tokens(40)
    x[3] *= 100
    statistics.update("layer", x, None)
    s = cases.inverse_smooth(K)
    assert statistics.range_of("layer") == float(x.abs().max())
    assert statistics.range_of("layer", s) == float((x.abs().amax(0) / s).max())
    maxima = rotated_maxima(x, 1.0 / s, 16)
    assert statistics.range_of("layer", s, 16) == float(maxima.max())
    assert statistics.peak("layer", s, 16) == float(maxima.max() / maxima[:KEPT].median())
    assert statistics.peak("layer", s) == statistics.peak("layer") > 50


def test_tokens_are_chosen_for_the_configured_rotation() -> None:
    x = tokens(500)
    for config, rotation in (
        (SmoothQuantConfig(rotation=4), 4),
        (SmoothQuantConfig(rotation="none"), 16),
    ):
        statistics = ActivationStatistics(config=config)
        statistics.update("layer", x, None)
        rows, expected = statistics.rows["layer"], kept(x, rotation=rotation)
        assert_bitwise_equal(rows.largest, expected.largest)
        assert not torch.equal(expected.largest, kept(x, rotation=20 - rotation).largest)


def test_statistics_without_rows_have_no_rotated_range() -> None:
    statistics = ActivationStatistics(absmax={"layer": torch.ones(8)})
    with pytest.raises(SmoothQuantError, match=r"no rows of layer.*calibrate again"):
        statistics.range_of("layer", None, 8)
