"""Streamed quantization: the same checkpoint as in memory, resumable after any interruption, and little memory."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from smoothquant_kernels import (
    SmoothQuantConfig,
    load_quantized,
    save_quantized,
    smooth_and_quantize,
)
from smoothquant_kernels.evaluation.models import load_model
from smoothquant_kernels.streaming import stream as stream_module
from smoothquant_kernels.streaming.stream import quantize_streamed
from tests.support.checkpoints import assert_same_state, contents, logits, manifest_of, refusal
from tests.support.models import CONFIGS, LLAMA_LIKE, VOCAB
from tests.support.streams import BATCHES, Stopped, family, save_float
from tools.build.plan import ROOT


def padded() -> list[dict[str, torch.Tensor]]:
    """Batches with padding on either side. Masks reach the blocks, and padding is not measured."""
    mask = torch.ones(2, 24, dtype=torch.long)
    mask[0, :5] = 0
    other = torch.ones(2, 24, dtype=torch.long)
    other[1, 20:] = 0
    return [
        {"input_ids": b, "attention_mask": m}
        for b, m in zip(BATCHES, (mask, other, mask), strict=True)
    ]


def in_memory(source: Path, folder: Path, data: Any, config: Any, dtype: Any) -> Path:
    model = load_model(source, dtype=dtype)
    save_quantized(smooth_and_quantize(model, data, config, progress=False), folder)
    return folder


def assert_same_checkpoint(got: Path, expected: Path) -> None:
    """Compares all but the shard layout and rounding noise, which depends on the weights' alignment in memory."""
    a, b = manifest_of(got), manifest_of(expected)
    weights = [{n for n in m["files"] if n.endswith(".safetensors")} for m in (a, b)]
    assert a["files"].keys() - weights[0] == b["files"].keys() - weights[1]
    for name in b["files"].keys() - weights[1]:
        assert (got / name).read_text() == (expected / name).read_text(), name
    for m in (a, b):
        for entry in m["tensors"].values():
            del entry["file"]
        del m["files"], m["digest"]
    for m in (a, b):
        change = (m["info"].get("verification") or {}).pop("relative_change", 0.0)
        assert 0 <= change <= 1e-5  # every product that is rounded once more adds about 1e-7
        for layer in m["info"]["layers"]:  # percentages of int8 errors, which show that noise too
            layer["reason"] = re.sub(r"[0-9.]+%", "%", layer["reason"])
    for key in b:
        assert a[key] == b[key], key
        assert json.dumps(a[key]) == json.dumps(b[key]), f"order of {key}"
    one, two = load_quantized(got), load_quantized(expected)
    assert_same_state(one, two)
    assert torch.equal(logits(one), logits(two))


CASES = [
    ("llama", "static", {}),
    ("llama_gqa", "per_token", {"skip": ("*.1.mlp.*",), "alphas": {"model.layers.0.*_proj*": 0.3}}),
    ("tied", "static", {"smooth": False}),
    ("opt", "per_token", {"skip": ("model.decoder.layers.0.*",)}),
    ("gpt_neox", "per_tensor", {}),
    ("gpt2", "static", {}),
    ("bloom", "static", {}),
    ("qwen3", "per_token", {"folding": "never"}),
    ("gemma2", "per_token", {}),
    ("llama_gqa", "static", {"weight_rounding": "gptq"}),
    ("llama_gqa", "static", {"formats": {"*.mlp.*": "w4a8"}}),
    ("llama", "per_token", {"w_bit": 4, "quantize_head": True, "formats": {"*.o_proj": "w8a8"}}),
    ("tied", "static", {"quantize_head": True}),
    ("opt", "per_tensor", {"quantize_head": True, "weight_granularity": "tensor"}),
    ("llama", "per_token", {"quantize_head": True, "skip": ("model.*",)}),
]


@pytest.mark.parametrize(("name", "scheme", "options"), CASES, ids=[c[0] for c in CASES])
def test_streaming_equals_quantizing_in_memory(
    tmp_path: Path, name: str, scheme: str, options: Any
) -> None:
    source = save_float(family(name), tmp_path / "float")
    config = SmoothQuantConfig(activation_scheme=scheme, alpha=None, **options)
    expected = in_memory(source, tmp_path / "memory", padded(), config, torch.float32)
    got = quantize_streamed(source, tmp_path / "streamed", padded(), config, progress=False)
    assert_same_checkpoint(got, expected)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["float", "memory", "streamed"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, None])
def test_half_precision_and_strings(
    tmp_path: Path, dtype: torch.dtype | None, word_tokenizer: Any
) -> None:
    """bfloat16 weights in one file, an untied head, and strings as calibration data."""
    source = save_float(family("llama_gqa").to(torch.bfloat16), tmp_path / "float", shards="1GB")
    assert (source / "model.safetensors").is_file()
    words = word_tokenizer([f"w{i}" for i in range(VOCAB)])
    data = [" ".join(f"w{(7 * i * i) % VOCAB}" for i in range(40))]
    config = SmoothQuantConfig(calibration_window=16, calibration_tokens=36)
    model = load_model(source, dtype=torch.bfloat16)
    model = smooth_and_quantize(model, data, config, tokenizer=words, progress=False)
    save_quantized(model, tmp_path / "memory", tokenizer=words)
    quantize_streamed(
        source, tmp_path / "streamed", data, config, tokenizer=words, dtype=dtype, progress=False
    )
    assert_same_checkpoint(tmp_path / "streamed", tmp_path / "memory")


@pytest.mark.parametrize("rounding", ["none", "power_of_two"])
def test_linears_outside_the_blocks(tmp_path: Path, rounding: str) -> None:
    """OPT-350m has project_in and project_out, which streaming smooths after the blocks.

    So the sample that verifies the blocks has passed an unsmoothed project_in, and the recorded change of the output is
    the rounding noise of another computation. With powers of two there is no such noise.
    """
    settings = {
        **CONFIGS["opt"]().to_dict(),
        "word_embed_proj_dim": 16,
        "do_layer_norm_before": True,
    }
    torch.manual_seed(0)
    model = transformers.OPTForCausalLM(transformers.OPTConfig(**settings))
    source = save_float(model, tmp_path / "float")
    config = SmoothQuantConfig(activation_scheme="static", smooth_rounding=rounding)
    expected = in_memory(source, tmp_path / "memory", BATCHES, config, torch.float32)
    got = quantize_streamed(source, tmp_path / "streamed", BATCHES, config, progress=False)
    names = [layer["name"] for layer in manifest_of(got)["info"]["layers"]]
    assert {"model.decoder.project_in", "model.decoder.project_out"} <= set(names)
    powers = rounding == "power_of_two"
    assert manifest_of(got)["info"]["verification"]["bit_exact"] is powers
    assert_same_checkpoint(got, expected)


# --- interruptions ----------------------------------------------------------------------------------------------------


def stop_after(index: int, monkeypatch: pytest.MonkeyPatch) -> None:
    finish = stream_module.WorkFolder.finish_block

    def stop(self: Any, i: int, *args: Any) -> None:
        finish(self, i, *args)
        if i == index:
            raise Stopped

    monkeypatch.setattr(stream_module.WorkFolder, "finish_block", stop)


@pytest.mark.parametrize("name", ["llama_gqa", "bloom"])
def test_resumes_after_the_last_finished_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """BLOOM's blocks return tuples. The second call must know that without running the first block."""
    source = save_float(family(name), tmp_path / "float")
    config = SmoothQuantConfig(activation_scheme="static")
    whole = quantize_streamed(source, tmp_path / "whole", padded(), config, progress=False)
    target = tmp_path / "target"
    with monkeypatch.context() as patch:
        stop_after(0, patch)
        with pytest.raises(Stopped):
            quantize_streamed(source, target, padded(), config, progress=False)
    assert not target.exists()
    assert (tmp_path / ".target.partial" / "checkpoint").is_dir()
    blocks: list[int] = []
    step = stream_module.BlockChain.step

    def note(self: Any, index: int, *args: Any) -> torch.Tensor:
        blocks.append(index)
        return step(self, index, *args)

    monkeypatch.setattr(stream_module.BlockChain, "step", note)
    quantize_streamed(source, target, padded(), config, progress=False)
    assert set(blocks) == {1}, "the first block must not run again"
    assert contents(target) == contents(whole)
    assert not list(tmp_path.glob(".*"))


def test_work_of_another_call_is_not_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = save_float(family("llama"), tmp_path / "float")
    target = tmp_path / "target"
    with monkeypatch.context() as patch:
        stop_after(0, patch)
        with pytest.raises(Stopped):
            quantize_streamed(source, target, BATCHES, progress=False)
    before = contents(tmp_path)

    def call(data: Any = BATCHES, **options: Any) -> str:
        return refusal(lambda: quantize_streamed(source, target, data, progress=False, **options))

    assert "another calibration data:" in call(BATCHES[:2])
    assert "another config:" in call(config=SmoothQuantConfig(alpha=0.1))
    assert "another dtype:" in call(dtype=torch.bfloat16)
    os.utime(source / "config.json", (1, 1))
    assert "another source:" in call()
    assert contents(tmp_path) == before
    config = SmoothQuantConfig(alpha=0.1)
    quantize_streamed(source, target, BATCHES, config, resume=False, progress=False)
    assert manifest_of(target)["info"]["config"]["alpha"] == 0.1
    assert not list(tmp_path.glob(".*"))


SCRIPT = """
import os, signal, sys
import torch
sys.path.insert(0, sys.argv[1])
from tests.support.models import token_batches
from smoothquant_kernels.streaming import stream
finish = stream.WorkFolder.finish_block
def die(self, index, *args):
    if index == 1:  # in the middle of a block: its shard is written, but not its record
        os.kill(os.getpid(), signal.SIGKILL)
    finish(self, index, *args)
stream.WorkFolder.finish_block = die
stream.quantize_streamed(sys.argv[2], sys.argv[3], token_batches(3), progress=False)
"""


def run_script(
    code: str, *arguments: object, timeout: float = 300
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, str(ROOT), *map(str, arguments)]
    # Makes malloc map large blocks, so that freed ones no longer count against the memory limit.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "1000000"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)


@pytest.mark.slow
def test_resumes_after_a_kill(tmp_path: Path) -> None:
    source = save_float(family("llama"), tmp_path / "float")
    whole = quantize_streamed(source, tmp_path / "whole", BATCHES, progress=False)
    done = run_script(SCRIPT, source, tmp_path / "target")
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not (tmp_path / "target").exists()
    quantize_streamed(source, tmp_path / "target", BATCHES, progress=False)
    assert contents(tmp_path / "target") == contents(whole)
    assert not list(tmp_path.glob(".*"))


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_models_that_cannot_be_streamed_are_refused(tmp_path: Path) -> None:
    def call(source: Path, **options: Any) -> str:
        target = tmp_path / "target"
        text = refusal(
            lambda: quantize_streamed(source, target, BATCHES, progress=False, **options)
        )
        assert not target.exists()
        assert not list(tmp_path.glob(".*"))
        return text

    assert "neither model.safetensors nor" in call(tmp_path)
    sizes = {k: v for k, v in LLAMA_LIKE.items() if k.startswith(("vocab", "hidden"))}
    t5 = transformers.T5Config(
        vocab_size=VOCAB,
        d_model=32,
        d_ff=64,
        num_layers=1,
        num_heads=4,
        d_kv=8,
        decoder_start_token_id=0,
    )
    assert "encoder-decoder" in call(
        save_float(transformers.T5ForConditionalGeneration(t5), tmp_path / "t5")
    )
    albert = transformers.AlbertConfig(
        **sizes, embedding_size=16, num_attention_heads=4, intermediate_size=64, num_hidden_layers=3
    )
    text = call(save_float(transformers.AlbertForMaskedLM(albert), tmp_path / "albert"))
    assert "smooth_and_quantize" in text
    source = save_float(family("llama"), tmp_path / "llama")
    shard = sorted(source.glob("model-*.safetensors"))[1]
    data = shard.read_bytes()
    shard.write_bytes(data[:-4])
    assert f"{shard} cannot be read (it has " in call(source)
    shard.unlink()
    assert "cannot be read" in call(source)
    shard.write_bytes(data)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    assert "has no tensor model.layers.2." in call(source)
    (source / "config.json").write_text(json.dumps({**config, "hidden_size": 64}))
    assert "has shape" in call(source)
    (source / "config.json").write_text(json.dumps(config))
    assert "empty" in refusal(
        lambda: quantize_streamed(source, tmp_path / "target", [], progress=False)
    )
    assert "no linear layer" in call(source, config=SmoothQuantConfig(skip=("*",)))


def test_blocks_that_are_not_a_chain_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = save_float(family("llama"), tmp_path / "float")
    layer = transformers.models.llama.modeling_llama.LlamaModel
    forward = layer.forward

    def twice(self: Any, *args: Any, **kwargs: Any) -> Any:
        forward(self, *args, **kwargs)
        return forward(self, *args, **kwargs)

    def call() -> str:
        return refusal(
            lambda: quantize_streamed(
                source, tmp_path / "target", BATCHES, progress=False, resume=False
            )
        )

    with monkeypatch.context() as patch:
        patch.setattr(layer, "forward", twice)
        assert "not called once each" in call()

    state: list[torch.Tensor] = []

    def between(self: Any, *args: Any, **kwargs: Any) -> Any:
        first = self.layers[0]
        handle = first.register_forward_hook(lambda m, a, out: out + 1)
        try:
            return forward(self, *args, **kwargs)
        finally:
            handle.remove()

    with monkeypatch.context() as patch:
        patch.setattr(layer, "forward", between)
        assert "does not read the output of the block before it" in call()

    def leaking(self: Any, *args: Any, **kwargs: Any) -> Any:
        first, second = self.layers
        handles = [
            first.register_forward_hook(lambda m, a, out: state.append(out)),
            second.register_forward_pre_hook(
                lambda m, a, k: (a, {**k, "extra": state[-1].sum()}), with_kwargs=True
            ),
        ]
        try:
            return forward(self, *args, **kwargs)
        finally:
            for handle in handles:
                handle.remove()

    with monkeypatch.context() as patch:
        patch.setattr(layer, "forward", leaking)
        assert "depends on other blocks" in call()


# --- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="needs Linux")
def test_streaming_stays_below_a_memory_limit(tmp_path: Path) -> None:
    """606 MB of weights in blocks of 38 MB fit a limit of 200 MB. Quantizing in memory fails under that limit."""
    from tests.support.stream_memory import make

    assert make(tmp_path / "float", 16, 1024, 2048) > 3 * 200e6
    program = str(Path(__file__).parents[1] / "support" / "stream_memory.py")
    code = f"import runpy, sys; sys.argv[:2] = [{program!r}]; runpy.run_path({program!r}, run_name='__main__')"
    done = run_script(code, "stream", tmp_path / "float", tmp_path / "out", 200)
    if done.stdout.strip() == "unlimited":
        pytest.skip("the limit on memory does not bind here")
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(manifest_of(tmp_path / "out")["info"]["layers"]) == 16 * 7
    done = run_script(code, "memory", tmp_path / "float", tmp_path / "other", 200)
    assert done.returncode != 0 and "memory" in done.stderr
