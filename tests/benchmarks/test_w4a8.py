"""The benchmark of 4-bit weights: settings that exist, every row in the file, bytes, times, and the table."""

from __future__ import annotations

import copy
import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import peers, w4a8
from benchmarks.lib import w4_peers
from benchmarks.pages import w4_tables
from smoothquant_kernels import SmoothQuantConfig, quantize_model
from tests.support.models import make_model, token_batches

FOUND = {
    "perplexity": 15.25,
    "change_percent": -1.5,
    "change_stderr": 0.25,
    "mean_kl": 0.0625,
    "kl_stderr": 0.001,
    "tokens": 1023,
}
FACTS = {"model": "M", "cpu": "a CPU", "calibration_tokens": 9, "libraries": {"torch": "2"}}


class Fake:
    """Stands in for `W4Bench`."""

    model = nn.Linear(2, 2)

    def row(self, name: str, model: object) -> dict[str, Any]:
        assert model is self.model
        return {"model": name, **FOUND}

    def made(self, name: str, settings: dict[str, Any]) -> dict[str, Any]:
        if "max_bytes" not in settings:
            SmoothQuantConfig(**settings)  # refuses unknown names and values
        return {"model": name, **FOUND}


def test_rows_have_settings_and_reach_the_file(tmp_path: Path) -> None:
    file = tmp_path / "w4a8.json"
    rows = w4a8.measure(Fake(), list(w4a8.ROWS), [], Namespace(json=file, resume=False), FACTS)
    assert [row["model"] for row in rows] == ["float32", *w4a8.ROWS]
    found = json.loads(file.read_text("utf-8"))
    assert found["facts"] == FACTS and found["rows"] == rows
    configs = {
        name: SmoothQuantConfig(**settings)
        for name, settings in w4a8.ROWS.items()
        if "max_bytes" not in settings
    }
    assert set(w4a8.ROWS) - set(configs) == {f"plan of {n} % of W8A8's bytes" for n in (60, 75)}
    for name, config in configs.items():
        assert config.format_of("a") == ("w4a8" if "W4A8" in name else "w8a8")
        assert (config.rounding_of("a") == "gptq") == ("GPTQ" in name)
        assert (config.rotation == "none") == ("rotated" not in name and "W4A8" in name) or (
            "W8A8" in name and (config.rotation == "none") == ("no rotation" in name)
        )
    assert len(set(map(str, w4a8.ROWS.values()))) == len(w4a8.ROWS)


def test_the_bytes_of_a_plan() -> None:
    """The quantized layers of a searched plan stay within the part of W8A8's bytes."""
    bench = object.__new__(w4a8.W4Bench)
    bench.model, bench.data = make_model("llama_gqa"), token_batches(4)
    sizes = []
    for config in (bench.planned(0.97).config, SmoothQuantConfig()):
        model = copy.deepcopy(bench.model)
        quantize_model(model, config=config.replace(rotation="none", rotations={}))
        sizes.append(w4_peers.linear_bytes(model))
    assert sizes[0] <= 0.97 * sizes[1]


def test_an_interrupted_run_goes_on(tmp_path: Path) -> None:
    """Rows of the file are not measured again, whatever the order, and another machine's are refused."""
    file, (first, second, *_) = tmp_path / "w4a8.json", w4a8.ROWS
    w4a8.measure(Fake(), [second], [], Namespace(json=file, resume=False), FACTS)

    class Once(Fake):
        def row(self, name: str, model: object) -> dict[str, Any]:
            raise AssertionError(name)

        def made(self, name: str, settings: dict[str, Any]) -> dict[str, Any]:
            assert name == first
            return super().made(name, settings)

    resumed = Namespace(json=file, resume=True)
    rows = w4a8.measure(Once(), [first, second], [], resumed, FACTS)
    assert [row["model"] for row in rows] == ["float32", first, second]
    assert json.loads(file.read_text("utf-8"))["rows"] == rows
    with pytest.raises(SystemExit, match="start a new file"):
        w4a8.measure(Once(), [first], [], resumed, {**FACTS, "cpu": "another"})


def test_peers_are_tools_of_the_other_benchmark() -> None:
    assert {tool for tool, _, _ in w4a8.PEERS} == set(w4_peers.TOOLS) <= set(peers.TOOLS)
    assert set(w4_peers.DISTRIBUTIONS) == set(w4_peers.TOOLS)
    labels = [label for _, label, _ in w4a8.PEERS]
    assert len(set(labels)) == len(labels)


def test_a_peer_that_fails_or_hangs_says_so(tmp_path: Path) -> None:
    """Its interpreter is a script here: one prints an error and ends, the other never does."""
    script = tmp_path / "python"
    args = Namespace(tokens=8, calibration=8, logs=None, patience=0.5)
    for text, said in (
        ("echo first; echo 'ValueError: no'; exit 1", "ValueError: no"),
        ("echo 'lib.BadError: no. Do'; echo '  - a'; exit 1", "lib.BadError: no."),
        ("echo a; echo b; exit 1", "b"),
        ("exit 1", "it printed nothing"),
        ("exec sleep 60", "it had not ended after 0 s"),
    ):
        script.write_text(f"#!/bin/sh\n{text}\n")
        script.chmod(0o755)
        args.patience = 0.5 if "sleep" in text else 60.0
        row = peers.run_case(w4a8.PEERS[0], str(script), tmp_path, args)
        assert row["failed"] == said and row["label"] == w4a8.PEERS[0][1]


def test_bytes_of_the_linears() -> None:
    """Those of the quantized layers, in memory: 4 bits, a step, an offset and a scale; the head does not count."""
    model = make_model("llama_gqa")
    weights = {n: m.weight for n, m in model.named_modules() if n.endswith("_proj")}
    assert w4_peers.linear_bytes(model) == 4 * sum(w.numel() for w in weights.values())
    quantize_model(model, config=SmoothQuantConfig(w_bit=4, rotation="none"))
    expected = sum(len(w) * (-(-w.shape[1] // 128) * 66 + 4) for w in weights.values())
    assert w4_peers.linear_bytes(model) == expected


def test_the_decode_ratio(monkeypatch: pytest.MonkeyPatch) -> None:
    model, threads = make_model("llama_gqa"), torch.get_num_threads()
    clock = iter(range(1000))
    monkeypatch.setattr(w4_peers.time, "process_time", lambda: next(clock))
    found = w4_peers.decode_ratio(model, model, token_batches(1)[0][:1])
    assert found["decode_ratio"] == found["decode_ratio_least"] == found["decode_ratio_most"] == 1
    assert found["decode_cpu_s"] == 1 / w4_peers.STEPS
    assert torch.get_num_threads() == threads


def test_the_table() -> None:
    rows = [
        {"model": "float32", **FOUND, "decode_ratio": 1.0, "linear_bytes": 424_000_000},
        {"model": "A", **FOUND, "linear_bytes": 9_000_000, "saved_bytes": 2_000_000}
        | {"tool": "auto-round", "versions": {"torch": "2", "peer": "1.5"}},
        {"model": "C", **FOUND, "linear_bytes": 9_000_000, "tool": "auto-round"},
        {"model": "D", **FOUND, "linear_bytes": 9_000_000, "tool": "torchao W4"},
        {"model": "B", "failed": "ValueError: no"},
    ]
    lines = w4_tables.formats({"facts": FACTS, "rows": rows}).splitlines()
    assert "M, 1023 tokens, the same for every row; calibrated on 9 tokens" in lines[0]
    assert "a CPU; torch 2, peer 1.5" in lines[0]
    shared = "15.250 | -1.50 ± 0.25 % | 0.0625 ± 0.0010"
    assert f"| float32 | {shared} | 424.0 | 1.00 |" in lines
    for name, megabytes in (("A", "2.0"), ("C", ""), ("D", "9.0")):
        assert f"| {name} | {shared} | {megabytes} |  |" in lines
    assert lines[-1] == "* B does not run: `ValueError: no`"
