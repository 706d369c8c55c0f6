"""Streaming into the compressed-tensors format writes what `save_quantized` writes for the model in memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from smoothquant_kernels import (
    SmoothQuantConfig,
    load_quantized,
    save_quantized,
    smooth_and_quantize,
)
from smoothquant_kernels.checkpoint.compressed_tensors.export import exportable
from smoothquant_kernels.checkpoint.manifest import RECORD
from smoothquant_kernels.evaluation.models import load_model
from smoothquant_kernels.streaming import stream as stream_module
from smoothquant_kernels.streaming.stream import quantize_streamed
from tests.support.checkpoints import contents, logits, refusal
from tests.support.models import make_model
from tests.support.streams import BATCHES, Stopped, family, save_float

FORMAT = "compressed-tensors"


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {n: t for f in folder.glob("*.safetensors") for n, t in load_file(f).items()}


CASES = [
    ("llama", {"activation_scheme": "static"}),
    ("llama_gqa", {"skip": ("*.1.mlp.*",)}),
    ("qwen2", {"activation_scheme": "static", "weight_granularity": "tensor"}),
    ("tied", {}),
    ("opt", {"schemes": {"*.1.fc1": "static"}}),
]


@pytest.mark.parametrize(("name", "settings"), CASES, ids=[name for name, _ in CASES])
def test_as_in_memory(name: str, settings: dict[str, Any], tmp_path: Path) -> None:
    source = save_float(family(name), tmp_path / "float")
    config = exportable(SmoothQuantConfig(only_where_better=False, **settings))
    streamed = quantize_streamed(
        source,
        tmp_path / "s",
        BATCHES,
        config,
        format=FORMAT,
        progress=False,
        max_shard_bytes=30_000,
    )
    model = smooth_and_quantize(
        load_model(source, dtype=torch.float32), BATCHES, config, progress=False
    )
    whole = save_quantized(model, tmp_path / "m", format=FORMAT)
    got, expected = tensors(streamed), tensors(whole)
    assert got.keys() == expected.keys()
    assert all(got[n].dtype == t.dtype and got[n].equal(t) for n, t in expected.items())
    for file in ("config.json", "generation_config.json"):
        assert (streamed / file).read_text() == (whole / file).read_text()
    index = json.loads((streamed / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == expected.keys()
    a, b = (json.loads((f / RECORD).read_text())["info"]["layers"] for f in (streamed, whole))
    for one, two in zip(a, b, strict=True):
        assert (one["name"], one["smoothing"]) == (two["name"], two["smoothing"])
    assert torch.equal(logits(load_quantized(streamed)), logits(model))


def test_it_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = save_float(make_model("llama_gqa"), tmp_path / "float")
    config = exportable(SmoothQuantConfig())

    def run(folder: str, format: str = FORMAT) -> Path:
        return quantize_streamed(
            source, tmp_path / folder, BATCHES, config, format=format, progress=False
        )

    expected = contents(run("whole"))
    finish = stream_module.WorkFolder.finish_block

    def stop(self: Any, index: int, *rest: Any) -> None:
        finish(self, index, *rest)
        raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr(stream_module.WorkFolder, "finish_block", stop)
        with pytest.raises(Stopped):
            run("q")
    assert "unfinished work of a call with another format" in refusal(lambda: run("q", "native"))
    assert contents(run("q")) == expected


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (
            SmoothQuantConfig(),
            "cannot express division at run time and rotation: quantize the float",
        ),
        (SmoothQuantConfig(folding="only"), "cannot express division at run time and rotation"),
        (
            SmoothQuantConfig(folding="only", rotation="none", activation_scheme="per_tensor"),
            "vLLM has no per_tensor",
        ),
    ],
)
def test_other_settings_are_refused_at_once(
    config: SmoothQuantConfig, words: str, tmp_path: Path
) -> None:
    def call() -> Path:
        absent = tmp_path / "absent"
        return quantize_streamed(absent, tmp_path / "q", BATCHES, config, format=FORMAT)

    assert words in refusal(call)


def test_folding_may_be_required(tmp_path: Path) -> None:
    source = save_float(make_model("gpt_neox"), tmp_path / "float")
    config = exportable(SmoothQuantConfig(), strict=True)
    words = refusal(
        lambda: quantize_streamed(
            source, tmp_path / "q", BATCHES, config, format=FORMAT, progress=False
        )
    )
    assert "would stay unsmoothed, which folding='required' forbids" in words
    assert [p.name for p in tmp_path.iterdir()] == ["float"]


def test_layers_that_the_format_lacks_are_refused_before_any_work(tmp_path: Path) -> None:
    source = save_float(make_model("gpt2"), tmp_path / "float")
    config = exportable(SmoothQuantConfig())
    words = refusal(
        lambda: quantize_streamed(
            source, tmp_path / "q", BATCHES, config, format=FORMAT, progress=False
        )
    )
    assert "transformer.h.0.attn.c_attn is a Conv1D in the float model: name it in skip" in words
    assert [p.name for p in tmp_path.iterdir()] == ["float"]
