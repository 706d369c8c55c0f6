"""Accuracy is shown on two kinds of text: the one that settings were chosen on, and another."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import other_text
import pytest
import tables

FACTS = {"model": "M", "torch": "2.13.0", "evaluation_tokens": 3072, "calibration_tokens": 4096}


def numbers(change: float) -> dict[str, Any]:
    return {
        "perplexity": 10 + change, "change_percent": change, "change_stderr": 0.5,
        "mean_kl": change / 100, "top1_agreement": 0.9,
    }  # fmt: skip


def row(name: str, change: float, **more: Any) -> dict[str, Any]:
    return {"model": name, **numbers(change), **more}


def test_both_kinds_of_text_stand_side_by_side() -> None:
    rows = [
        row("float32", 0.0, news=numbers(0.0)),
        row("SmoothQuant W8A8", 1.0, scheme="static", news=numbers(4.0)),
    ]
    text = tables.accuracy({"facts": {**FACTS, "other": "news"}, "schemes": rows}, "schemes")
    caption, header, _, first, second = [line for line in text.splitlines() if line]
    assert "and news, as many tokens, which no choice of settings saw" in caption
    cells = [cell.strip() for cell in header.strip("|").split("|")]
    assert cells[2:] == [
        "perplexity", "change", "mean KL", "same top-1",
        "perplexity on news", "change", "mean KL", "same top-1",
    ]  # fmt: skip
    assert [cell.strip() for cell in first.strip("|").split("|")][2:] == [
        "10.000", "", "", "", "10.000", "", "", "",
    ]  # fmt: skip
    assert [cell.strip() for cell in second.strip("|").split("|")][2:] == [
        "11.000", "+1.00 ± 0.50 %", "0.0100", "90.0 %",
        "14.000", "+4.00 ± 0.50 %", "0.0400", "90.0 %",
    ]  # fmt: skip


@pytest.mark.parametrize("facts", [FACTS, {**FACTS, "other": None}, {**FACTS, "other": "news"}])
def test_results_on_one_kind_of_text_have_its_columns_alone(facts: dict[str, Any]) -> None:
    rows = [row("SmoothQuant W8A8", 1.0, scheme="static")]
    assert "news" not in tables.accuracy({"facts": facts, "schemes": rows}, "schemes")


def test_the_articles_of_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / other_text._FILE
    file.parent.mkdir(parents=True)
    file.write_text("One article.\n\nAnother one.\n")
    spec = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(other_text, "find_spec", lambda name: spec if name == "gensim" else None)
    assert other_text.news() == ["One article.", "Another one."]
    file.unlink()
    assert other_text.news() is None
    monkeypatch.setattr(other_text, "find_spec", lambda _: None)
    assert other_text.news() is None


@pytest.mark.skipif(importlib.util.find_spec("gensim") is None, reason="needs gensim's data")
def test_the_real_articles() -> None:
    articles = other_text.news()
    assert articles is not None and len(articles) == 300
    assert articles[0].startswith("Hundreds of people have been forced to vacate their homes")
