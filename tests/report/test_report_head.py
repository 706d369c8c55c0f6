"""A report on a model whose output head is quantized: the head is measured on every token, like any layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from smoothquant_kernels import SmoothQuantConfig, smooth_and_quantize
from smoothquant_kernels.report import figures
from smoothquant_kernels.report.report import make_report
from tests.support.models import token_batches
from tests.support.streams import family

DATA = token_batches()
HELD = [batch.flip(1) for batch in token_batches(2, 20, 3)]


def test_a_report_measures_the_head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "draw", lambda *a, **k: {})
    model: Any = family("tied")
    config = SmoothQuantConfig(activation_scheme="static", quantize_head=True)
    found = make_report(model, DATA, tmp_path / "r", config, held=HELD)
    assert (found["summary"]["quantized"], found["summary"]["skipped"]) == (15, 0)
    head = found["layers"][-1]
    assert (head["name"], head["smoothing"]) == ("lm_head", "runtime")
    assert head["activation_scheme"] == head["naive_scheme"] == "per_token"
    assert head["sqnr"] > 30 and head["channel_peak"] >= 1
    without = make_report(
        model, DATA, tmp_path / "s", config.replace(quantize_head=False), held=HELD
    )
    assert without["layers"] == found["layers"][:-1]  # only the head is measured in addition
    outputs: list[Any] = []

    def keep(_: Any, args: Any, y: Any) -> None:
        outputs.append((args[0].detach(), y.detach()))

    model.lm_head.register_forward_hook(keep)
    for ids in HELD:
        model(input_ids=ids)
    quantized = smooth_and_quantize(family("tied"), DATA, config, progress=False)
    noise = sum(float((quantized.lm_head(x) - y).square().sum()) for x, y in outputs)
    signal = sum(float(y.square().sum()) for _, y in outputs)
    assert 10 ** (-head["sqnr"] / 10) == pytest.approx(noise / signal, rel=1e-3)
