"""The benchmarks run on small shapes, their columns add up, and the documented tables are those of the results."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import bench_linear
import pytest
import tables
import torch
from timer import interleaved, median_ratio

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("scheme", ["per_token", "static"])
def test_linear_columns_add_up(scheme: str) -> None:
    row = bench_linear.measure(48, 40, 3, scheme, smooth=True, seconds=0.01)
    assert row["gops"] == pytest.approx(2 * 3 * 48 * 40 / (row["int8_us"] * 1e-6) / 1e9)
    assert row["rounds"] >= 5
    assert all(row[f"{name}_us"] > 0 for name in ("int8", "float32", "bfloat16"))


def test_variants_are_interleaved() -> None:
    calls: list[str] = []
    times = interleaved(
        {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, seconds=0, least=5
    )
    assert calls == ["a", "b"] * (len(calls) // 2)
    assert len(times["a"]) == len(times["b"]) == 5


def test_ratios_are_taken_pair_by_pair() -> None:
    """A machine that slows down tenfold half-way changes no ratio."""
    assert median_ratio([2.0, 2.0, 20.0, 20.0], [1.0, 1.0, 10.0, 10.0]) == 2.0


def test_planted_outliers_keep_the_function() -> None:
    from models import make_model, token_batches
    from planted import llama_readers, plant_outliers

    model = make_model("llama")
    ids = token_batches(1)[0]
    with torch.no_grad():
        before = model(input_ids=ids).logits
        norm = model.get_submodule("model.layers.1.input_layernorm")
        weight = norm.weight.detach().clone()
        readers = llama_readers(model)
        assert len(readers) == 4 and all(len(names) in (2, 3) for names in readers.values())
        plant_outliers(model, readers)
        assert int((norm.weight.abs() > 10 * weight.abs()).sum()) == 6
        torch.testing.assert_close(model(input_ids=ids).logits, before, rtol=1e-4, atol=1e-4)


def test_documented_tables_are_up_to_date() -> None:
    result = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "tables.py"), "--check"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout


def test_every_marked_table_is_known() -> None:
    marked = {
        m[2] for page in tables.PAGES for m in tables.MARKED.finditer((ROOT / page).read_text())
    }
    assert marked == set(tables.TABLES)
