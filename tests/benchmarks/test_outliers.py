"""benchmarks/outliers.py: its shares are those of the inputs, and it counts what layers take from a call."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import outliers
from benchmarks.accuracy import NAIVE, PLAIN, ROTATED
from smoothquant_kernels import OutlierLinear, calibrate_model, quantize_model
from tests.support.models import make_model, token_batches

pytestmark = pytest.mark.filterwarnings("ignore:the calibration data ended")
BATCHES = token_batches(3)


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    made = outliers.OutlierBench.__new__(outliers.OutlierBench)
    made.model, made.threshold, made.tokens = make_model("llama_gqa"), 2.8, 48
    made.text, made.tokenizer = [], None
    made.statistics = calibrate_model(made.model, BATCHES, progress=False)
    made.channels = sum(t.numel() for t in made.statistics.absmax.values())
    windows = [SimpleNamespace(input_ids=row) for row in BATCHES[0]]
    monkeypatch.setattr(outliers, "token_windows", lambda *_, **__: windows)
    return made


def test_shares_are_counted_from_the_inputs(bench: Any) -> None:
    found = bench.shares(NAIVE)
    absmax = bench.statistics.absmax
    assert found["calibrated_columns"] == sum(int((t >= 2.8).sum()) for t in absmax.values())
    assert found["calibrated"] == found["calibrated_columns"] / (13 * 32 + 32 + 2 * (88 - 32))
    assert found["with_columns"] == sum(bool((t >= 2.8).any()) for t in absmax.values())
    per_call = 0
    for row in BATCHES[0]:
        one = calibrate_model(bench.model, [row], progress=False)
        per_call += sum(int((t >= 2.8).sum()) for t in one.absmax.values())
    assert found["per_call"] == pytest.approx(per_call / 2 / bench.channels) == found["rotated"]
    assert bench.shares(PLAIN)["per_call"] < found["per_call"]
    bench.threshold = 0.5
    rotated = bench.shares(ROTATED)
    assert 0 < rotated["per_call"] != rotated["rotated"] > 0


def test_calls_are_counted(bench: Any) -> None:
    config = bench.config(f"{NAIVE}, dynamic")
    model = quantize_model(copy.deepcopy(bench.model), config=config)
    counted: list[int] = []
    with outliers.Counting(model, counted):
        for row in BATCHES[0]:
            model(input_ids=row[None])
    layers = [m for m in model.modules() if isinstance(m, OutlierLinear)]
    assert len(counted) == 2 * len(layers) == 28 and sum(counted) > 0
    model(input_ids=BATCHES[0])
    assert len(counted) == 28  # the hooks are gone


def test_rows_of_bitsandbytes_need_it() -> None:
    own = [name for name in outliers.row_names() if not name.startswith(outliers.PEER)]
    assert own[:3] == [NAIVE, f"{NAIVE}, static", f"{NAIVE}, dynamic"] and len(own) == 9
    pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    model = outliers.with_bitsandbytes(make_model("llama_gqa"), 2.8)
    counted: list[int] = []
    with outliers.Counting(model, counted):
        model(input_ids=BATCHES[0])
    assert len(counted) == 14 and sum(counted) > 0
