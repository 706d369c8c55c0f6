"""The benchmark of the int8 cache: its attention has the errors of the kernels, and its tables the file's numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t
from torch import Tensor

from benchmarks import kv_cache
from benchmarks.lib.fake_kv import NAME, Errors, FakeAttention
from benchmarks.pages import cache_tables, tables
from smoothquant_kernels import calibrate_kv_cache
from smoothquant_kernels import reference as ref
from smoothquant_kernels.kv_cache.calibration import KVCalibration, LayerMaxima
from tests.support.models import make_model, token_batches

HEADS, GROUP, TOKENS, DIM = 2, 3, 7, 16


def tokens(heads: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, heads, TOKENS, DIM, generator=generator)
    return x * torch.linspace(0.2, 4, DIM)  # channels of different sizes


def maxima(q: Tensor, k: Tensor, v: Tensor) -> KVCalibration:
    of_group = q.abs().amax((0, 2)).view(HEADS, GROUP, DIM).amax(1)
    return KVCalibration(
        {0: LayerMaxima(of_group, k.abs().amax((0, 2)), v.abs().amax((0, 2)))}, 2 * TOKENS
    )


class Layer:
    layer_idx = 0


@pytest.mark.parametrize(
    ("scheme", "alpha", "rotation"),
    [
        ("per_token", None, 0),
        ("per_token", None, 16),
        ("per_token", 0.5, 0),
        ("per_token", 0.5, 16),
        ("static", None, 0),
    ],
)
def test_the_attention_has_the_errors_of_the_specification(
    scheme: str, alpha: float | None, rotation: int
) -> None:
    q, k, v = tokens(HEADS * GROUP, 0), tokens(HEADS, 1), tokens(HEADS, 2)
    calibration = maxima(q, k, v)
    fake = FakeAttention(calibration, calibration)
    fake.errors = Errors(scheme, alpha, rotation, query=True)
    got, _ = fake(Layer(), q, k, v, None)
    k_smooth, v_smooth = calibration.factors(0, scheme, alpha)
    caches = [torch.zeros(2, HEADS, TOKENS, DIM, dtype=torch.int8) for _ in range(2)]
    scales: list[Any] = [None, None]
    if scheme == "per_token":
        scales = [torch.zeros(2, HEADS, TOKENS) for _ in range(2)]
    ref.kv_append(
        k, v, *caches, *scales, rotation=rotation,
        k_inv_smooth=None if k_smooth is None else 1 / k_smooth,
        v_inv_smooth=None if v_smooth is None else 1 / v_smooth,
    )  # fmt: skip
    expected = ref.decode_attention_s8(
        q, *caches, DIM**-0.5, *scales, k_smooth=k_smooth, v_smooth=v_smooth, rotation=rotation
    )
    # Divided or multiplied by a reciprocal, few of the values round to the next step of 127.
    wrong = (got.transpose(1, 2) - expected).norm() / expected.norm()
    assert wrong < 2e-3
    exact, _ = FakeAttention(calibration, calibration)(Layer(), q, k, v, None)
    assert (exact.transpose(1, 2) - expected).norm() / expected.norm() > 3e-3


def test_without_errors_it_is_the_models_attention() -> None:
    model: Any = make_model("llama_gqa")
    ids = token_batches(1)[0]
    calibration = calibrate_kv_cache(model, [ids], progress=False)
    fake = FakeAttention(calibration, calibration)
    with torch.no_grad():
        want = model(ids).logits
        with fake.of(model, Errors()) as changed:
            got = changed(ids).logits
        assert torch.equal(model(ids).logits, want)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert NAME not in t.AttentionInterface._global_mapping


def test_fewer_steps_of_p_cost_more() -> None:
    q, k, v = tokens(HEADS * GROUP, 0), tokens(HEADS, 1), tokens(HEADS, 2)
    calibration = maxima(q, k, v)
    fake = FakeAttention(calibration, calibration)
    exact = fake(Layer(), q, k, v, None)[0]
    errors = []
    for steps in (0, 255, 15):
        fake.errors = Errors(steps=steps)
        errors.append(float((fake(Layer(), q, k, v, None)[0] - exact).norm() / exact.norm()))
    assert errors[0] == 0 < errors[1] < errors[2]
    # The values of a token share its weight, whose step is at most 1/255 of the row's largest.
    assert errors[1] < 0.02


def test_rotated_maxima_are_those_of_rotated_keys() -> None:
    model = make_model("llama_gqa")
    plain, rotated = kv_cache.KVRecorder(model), kv_cache.RotatedRecorder(model)
    one = torch.zeros(1, 2, 1, 8)
    one[..., 3] = 2.0
    for recorder in (plain, rotated):
        recorder._record(0, one, one, one)
    assert plain.calibration(1).layers[0].k[0].tolist() == [0, 0, 0, 2, 0, 0, 0, 0]
    assert rotated.calibration(1).layers[0].k[0].tolist() == [2.0] * 8


ROW = {
    "cache": "int8 per token and head", "alpha": None, "rotation": 64, "query": False, "steps": 0, "tokens": 99,
    "change_percent": -0.5, "change_stderr": 0.25, "mean_kl": 0.00023, "kl_stderr": 0.00001, "top1_agreement": 0.99,
    "cache_bytes": 53, "float16_cache_bytes": 100,
}  # fmt: skip
DATA = {
    "facts": {"model": "M", "torch": "2.13", "calibration_tokens": 7},
    "schemes": [ROW, ROW | {"query": True, "mean_kl": 0.0005}],
    "prefill": [ROW | {"cache": "float", "query": True, "steps": 255}],
    "decode": [ROW],
    "greedy": [{"cache": "c", "all_agree": 0.9, "tokens_agree": 0.95, "agree_until": 30.0, "new_tokens": 32}],
    "memory": [{"cache": "c", "bytes": 2**20, "share": 0.53125, "tokens": 4096}],
}  # fmt: skip


@pytest.mark.parametrize("name", cache_tables.TABLES)
def test_tables(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    assert tables.TABLES[name]() == tables.NOT_MEASURED
    folder = tmp_path / "cpu_2026-01-01"
    folder.mkdir()
    (folder / "kv_cache.json").write_text(json.dumps(DATA))
    text = tables.TABLES[name]()
    assert text is not None
    expected = {
        "kv_schemes": [
            "| 64 | -0.50 ± 0.25 % | 0.00023 ± 0.00001 | 99.0 %",
            "| 0.00050 ± 0.00001 |",
        ],
        "kv_prefill": ["| float | int8 | 64 | int8, 255 steps |"],
        "kv_decode": ["| 0.00023 ± 0.00001 | 99.0 % | 53.0 % |"],
        "kv_greedy": ["| c | 90.0 % | 95.0 % | 30.0 of 32 |"],
        "kv_memory": ["| c | 1.0 MiB | 53.12 % | 256 |"],
    }
    for words in expected[name]:
        assert words in text
    assert text.startswith("M, ")
    (folder / "kv_cache.json").write_text(json.dumps({"facts": DATA["facts"]}))
    assert tables.TABLES[name]() == cache_tables.NOT_MEASURED
