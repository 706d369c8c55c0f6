"""The scripts in `examples/`, run as a user runs them on small real models; each result is checked."""

from __future__ import annotations

import copy
import json
import re
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from smoothquant_kernels import (
    SmoothQuantConfig,
    SmoothQuantError,
    W8A8Linear,
    load_quantized,
    smooth_and_quantize,
)
from smoothquant_kernels.evaluation.text import topics
from tools.build.plan import ROOT

LAYERS = 4
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
real_model = [pytest.mark.real_model, pytest.mark.slow]


def test_examples_stay_short() -> None:
    assert len(EXAMPLES) == 7
    for script in EXAMPLES:
        text = script.read_text(encoding="utf-8")
        assert len(text.splitlines()) <= 60, script.name
        # Each says how it is called; the page that lists them names it.
        assert f"python examples/{script.name} " in text
        assert f"`{script.name}`" in (ROOT / "docs" / "start" / "examples.md").read_text()


def run(capsys: pytest.CaptureFixture[str], name: str, *arguments: object) -> str:
    """What the script prints."""
    before, sys.argv = sys.argv, [name, *map(str, arguments)]
    try:
        capsys.readouterr()
        runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")
    finally:
        sys.argv = before
    return capsys.readouterr().out


def words(half: Any, count: int) -> str:
    """The first words of a half of Python's documentation, paragraphs kept."""
    pieces, left = [], count
    for paragraph in "\n\n".join(topics(half)).split("\n\n"):
        if left <= 0:
            break
        pieces.append(paragraph)
        left -= len(paragraph.split())
    return "\n\n".join(pieces)


@pytest.fixture(scope="module")
def folder(smollm2: tuple[Any, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2 as a folder with safetensors, as it is on the hub; a calibration text beside it."""
    folder = tmp_path_factory.mktemp("examples")
    model, tokenizer = smollm2
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "text.txt").write_text(words("calibration", 500), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def short(folder: Path, smollm2: tuple[Any, Any]) -> Path:
    """The first layers of SmolLM2, where all of them would take minutes: real weights, real outliers."""
    model = copy.deepcopy(smollm2[0])
    del model.model.layers[LAYERS:]
    model.config.num_hidden_layers = LAYERS
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = model.config.layer_types[:LAYERS]
    model.save_pretrained(folder / "short")
    smollm2[1].save_pretrained(folder / "short")
    return folder / "short"


@pytest.fixture(scope="module")
def quantized(folder: Path) -> Path:
    """What `quantize_and_save.py` wrote; the other scripts go on from there."""
    output = folder / "int8"
    main = runpy.run_path(str(ROOT / "examples" / "quantize_and_save.py"))["main"]
    main(str(folder / "model"), str(folder / "text.txt"), str(output))
    return output


def divergence(model: nn.Module, reference: nn.Module, ids: torch.Tensor) -> float:
    """The mean KL divergence from the reference's predictions, in nats."""
    with torch.no_grad():
        p, q = (m(input_ids=ids).logits[0].double().log_softmax(-1) for m in (reference, model))
    return float((p.exp() * (p - q)).sum(-1).mean())


class TestOnALanguageModel:
    pytestmark = real_model

    def test_quantize_and_save(
        self, quantized: Path, smollm2: tuple[Any, Any], capsys: pytest.CaptureFixture[str]
    ) -> None:
        reference, tokenizer = smollm2
        model = load_quantized(quantized)
        assert sum(isinstance(m, W8A8Linear) for m in model.modules()) == 210
        ids = tokenizer(words("evaluation", 150), return_tensors="pt").input_ids
        # Measured 0.01 to 0.02 on such text; naive int8 with one scale per tensor has 0.7.
        assert divergence(model, reference, ids) < 0.04

    def test_load_and_generate(self, quantized: Path, capsys: pytest.CaptureFixture[str]) -> None:
        said = run(capsys, "load_and_generate.py", quantized, "What is gravity?")
        assert "gravity" in said.lower()

    def test_generate_with_int8_cache(
        self, short: Path, smollm2: tuple[Any, Any], capsys: pytest.CaptureFixture[str]
    ) -> None:
        prompt = "Once upon a time"
        said = run(capsys, "generate_with_int8_cache.py", short, prompt)
        assert said.startswith(prompt)
        tokens = len(smollm2[1](prompt).input_ids) + 48 - 1  # the last one is never read
        heads, channels, scale = 3, 64, 4
        each = LAYERS * 2 * heads * (channels + scale)
        assert f"cache: {tokens} tokens, {each:,} bytes each" in said

    def test_streaming_gives_the_same_bits(
        self, short: Path, smollm2: tuple[Any, Any], capsys: pytest.CaptureFixture[str]
    ) -> None:
        text, output = short.parent / "text.txt", short.parent / "streamed"
        said = run(capsys, "stream_a_large_model.py", short, text, output)
        before, after = (int(n.replace(",", "")) for n in re.findall(r"([\d,]+) MB", said))
        float_linears = 4 * LAYERS * 3_538_944 / 1e6  # of a layer: q, k, v, o, gate, up and down
        assert 0.70 * float_linears < before - after < 0.75 * float_linears
        model = AutoModelForCausalLM.from_pretrained(short)
        texts = text.read_text(encoding="utf-8").split("\n\n")
        smooth_and_quantize(model, texts, tokenizer=smollm2[1], progress=False)
        ids = torch.arange(1, 65)[None]
        with torch.no_grad():
            pair = [m(input_ids=ids).logits for m in (model, load_quantized(output))]
        assert torch.equal(*pair)

    def test_search_settings(
        self, short: Path, smollm2: tuple[Any, Any], capsys: pytest.CaptureFixture[str]
    ) -> None:
        output = short.parent / "searched"
        said = run(capsys, "search_settings.py", short, short.parent / "text.txt", output)
        fixed, searched = (float(n) for n in re.findall(r"(\d\.\d+)", said)[:2])
        assert 0 < searched < fixed
        found = json.loads(Path(f"{output}.search.json").read_text())["result"]
        model = load_quantized(output)
        assert model.smoothquant_info["config"]["alphas"] == found["config"]["alphas"]
        reference = AutoModelForCausalLM.from_pretrained(short)
        texts = words("calibration", 500).split("\n\n")
        naive = SmoothQuantConfig(activation_scheme="static", smooth=False)
        unsmoothed = smooth_and_quantize(
            copy.deepcopy(reference), texts, naive, tokenizer=smollm2[1], progress=False
        )
        ids = smollm2[1](words("evaluation", 150), return_tensors="pt").input_ids
        assert divergence(model, reference, ids) < 0.5 * divergence(unsmoothed, reference, ids)


def test_serve_with_vllm_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """tests/vllm/test_real_model.py runs it where vLLM is installed."""
    main = runpy.run_path(str(ROOT / "examples" / "serve_with_vllm.py"))["main"]
    monkeypatch.setitem(main.__globals__, "find_spec", lambda _: None)
    with pytest.raises(SystemExit, match="vLLM is not installed: pip install vllm"):
        main("folder", "question")


@pytest.mark.real_model
@pytest.mark.slow
@pytest.mark.xdist_group("minilm")
def test_quantize_sentence_encoder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from benchmarks.sentence import minilm_folder, sentences

    try:
        model = minilm_folder()
    except SmoothQuantError as error:
        pytest.skip(str(error))
    file, output = tmp_path / "sentences.txt", tmp_path / "int8"
    file.write_text("\n".join(sentences("calibration", 128)), encoding="utf-8")
    said = run(capsys, "quantize_sentence_encoder.py", model, file, output)
    mean, least = (float(n) for n in re.findall(r"\d\.\d+", said))
    # docs/reference/accuracy.md: 0.9991 on average, 0.997 at worst of 300 sentences
    assert mean >= 0.999 and 0.99 <= least <= mean
    loaded = load_quantized(output)
    assert sum(isinstance(m, W8A8Linear) for m in loaded.modules()) == 37
