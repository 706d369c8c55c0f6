"""The weight files of a streamed checkpoint: as few as the limit allows, joined after the last block, resumable."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open

from smoothquant_kernels import load_quantized, quantize_streamed, register_transformers
from smoothquant_kernels.streaming import work
from tests.support.checkpoints import assert_same_state, contents, logits, refusal
from tests.support.streams import BATCHES, Stopped, family, save_float


def test_shards_are_joined_and_from_pretrained_reads_them(tmp_path: Path) -> None:
    """One file if everything fits, otherwise files of as many whole blocks as fit."""
    source = save_float(family("llama_gqa"), tmp_path / "float")
    whole = quantize_streamed(source, tmp_path / "one", BATCHES, progress=False)
    files = sorted(whole.glob("*.safetensors"))
    assert [f.name for f in files] == ["smoothquant.safetensors"]
    size = files[0].stat().st_size
    register_transformers()
    for limit, count in ((size * 3 // 4, 2), (1, 3)):  # two blocks and the rest
        folder = quantize_streamed(
            source, tmp_path / str(limit), BATCHES, progress=False, max_shard_bytes=limit
        )
        shards = sorted(f.name for f in folder.glob("*.safetensors"))
        assert shards == [f"smoothquant-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
        index = json.loads((folder / "smoothquant.safetensors.index.json").read_text())
        for shard in shards:
            with safe_open(folder / shard, framework="pt") as file:
                assert {n for n, f in index["weight_map"].items() if f == shard} == set(file.keys())
        expected = load_quantized(folder)
        described = json.loads((folder / "config.json").read_text())["quantization_config"]
        manifest = json.loads((folder / "smoothquant.json").read_text())
        for key in ("modules", "shared_modules"):
            assert described[key] == manifest[key]
        assert described["weights"] == "smoothquant.safetensors.index.json"
        loaded = transformers.AutoModelForCausalLM.from_pretrained(folder)
        assert_same_state(loaded, expected)
        assert torch.equal(logits(loaded), logits(load_quantized(whole)))
    assert "max_shard_bytes" in refusal(
        lambda: quantize_streamed(source, tmp_path / "x", BATCHES, max_shard_bytes=0)
    )


def test_resumes_while_files_are_joined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After an interruption, the first joined file is kept, because its blocks are deleted already."""
    source = save_float(family("llama"), tmp_path / "float")
    options: Any = {"progress": False, "max_shard_bytes": 1}
    whole = quantize_streamed(source, tmp_path / "whole", BATCHES, **options)
    join, calls = work.join_safetensors, []

    def failing(path: Path, parts: Any) -> Any:
        calls.append(path)
        if len(calls) == 2:
            raise Stopped
        return join(path, parts)

    monkeypatch.setattr(work, "join_safetensors", failing)
    with pytest.raises(Stopped):
        quantize_streamed(source, tmp_path / "target", BATCHES, **options)
    quantize_streamed(source, tmp_path / "target", BATCHES, **options)
    assert len(calls) == 4  # one success and one failure, then the remaining two
    assert contents(tmp_path / "target") == contents(whole)
    assert not list(tmp_path.glob(".*"))
