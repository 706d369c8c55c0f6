"""`quantize --format compressed-tensors`: what it writes and reports, in memory and streamed, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers

from smoothquant_kernels import load_quantized
from smoothquant_kernels.checkpoint.compressed_tensors.export import exportable
from smoothquant_kernels.config import SmoothQuantConfig
from tests.support.command_line import QUANTIZE, Result, refused, word_tokenizer
from tests.support.models import GQA, LLAMA_LIKE, VOCAB

FORMAT = ("--format", "compressed-tensors")


@pytest.fixture
def phi(tmp_path: Path) -> Path:
    """A model whose o_proj and down_proj have no producer."""
    torch.manual_seed(0)
    config = transformers.Phi3Config(**LLAMA_LIKE, pad_token_id=0)
    transformers.Phi3ForCausalLM(config).save_pretrained(tmp_path / "phi")
    word_tokenizer().save_pretrained(tmp_path / "phi")
    return tmp_path / "phi"


@pytest.mark.parametrize("how", [(), ("--stream",)])
def test_the_folder_and_the_report(
    how: tuple[str, ...], tiny: Path, text: Path, tmp_path: Path
) -> None:
    output = tmp_path / "q"
    common = ("quantize", tiny, "-o", output, *FORMAT, "--calibration", text, *QUANTIZE, *how)
    done = Result(*common, "--json").json
    assert done["format"] == "compressed-tensors" and done["quantized"] == 14
    expected = exportable(SmoothQuantConfig(calibration_tokens=200))
    assert done["config"] == expected.to_dict() | {"skip": []}
    assert not done["smoothing"]["runtime"]
    config = json.loads((output / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"
    assert (output / "tokenizer.json").is_file()
    weights = sum(p.stat().st_size for p in output.glob("*.safetensors"))
    assert done["bytes"]["weight_files"] == weights
    linears = sum(g["count"] * g["out_features"] * g["in_features"] for g in done["groups"])
    assert done["bytes"]["linears_before"] == 4 * linears
    assert 0 < done["bytes"]["linears_after"] - linears < 0.2 * linears  # scales
    assert load_quantized(output)
    for group in done["groups"]:
        assert how or (group["kl"] >= 0 and group["kl_divided"] is None)
        assert not how or "kl" not in group
    assert refused(*common) == f"{output} exists already; give another name, or --force."
    shown = Result(*common, "--force")
    assert shown.code == 0 and ("KL" in shown.out) == (not how)
    settings = "activations per_token, weights per channel, alpha 0.6"
    for said in (shown.out, Result("inspect", output).out):
        assert settings in said and "smoothing moved the float model's output" in said
    native = ("quantize", tiny, "-o", tmp_path / "n", "--calibration", text, *QUANTIZE, *how)
    assert "weights per channel, rotated by 32 and 64, alpha 0.5" in Result(*native).out


def test_layers_that_stay_unsmoothed_are_named_with_both_costs(
    phi: Path, text: Path, tmp_path: Path
) -> None:
    common = ("quantize", phi, "-o", tmp_path / "q", *FORMAT, "--calibration", text, *QUANTIZE)
    done = Result(*common, "--json").json
    left = {g["layers"]: g for g in done["groups"] if g["smoothing"] == "none"}
    for name in ("model.layers.*.self_attn.o_proj", "model.layers.*.mlp.down_proj"):
        assert left[name]["reason"].startswith("nothing divides at run time, and no producer")
        assert left[name]["kl"] > 0 and left[name]["kl_divided"] > 0
    shown = " ".join(Result(*common, "--force").out.split())
    total = sum(group["kl"] for group in done["groups"])
    assert f"a KL divergence of about {total:.4f} in all" in shown
    strict = (
        "quantize",
        phi,
        "-o",
        tmp_path / "s",
        *FORMAT,
        "--strict",
        "--calibration",
        text,
        *QUANTIZE,
    )
    for how in ((), ("--stream",)):
        words = refused(*strict, *how)
        assert "would stay unsmoothed, which --strict forbids" in words
    assert not (tmp_path / "s").exists()


def test_strict_accepts_what_is_folded(text: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**GQA))
    model.save_pretrained(tmp_path / "llama")
    word_tokenizer().save_pretrained(tmp_path / "llama")
    settings = tmp_path / "c.json"
    settings.write_text('{"only_where_better": false}')
    done = Result(
        "quantize", tmp_path / "llama", "-o", tmp_path / "q", *FORMAT, "--strict", "--config", settings,
        "--scheme", "static", "--calibration", text, *QUANTIZE, "--json",
    ).json  # fmt: skip
    assert done["smoothing"] == {"folded": 14, "runtime": 0, "none": 0}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--format", "gguf"), "format must be one of native, compressed-tensors; got 'gguf'."),
        ((*FORMAT, "--rotation", "16"), "has no rotation before a quantizer"),
        ((*FORMAT, "--scheme", "per_tensor"), "vLLM has no per_tensor activations"),
        ((*FORMAT, "--quantize-head"), "keep the output head in float"),
        (("--strict",), "the native format expresses everything"),
    ],
)
def test_refusals(options: tuple[str, ...], words: str, tiny: Path, tmp_path: Path) -> None:
    assert words in refused("quantize", tiny, "-o", tmp_path / "q", *options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("how", [(), ("--stream",)])
def test_layers_that_the_format_lacks_are_refused_before_calibration(
    how: tuple[str, ...], text: Path, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=1, n_head=4)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    word_tokenizer().save_pretrained(tmp_path / "gpt2")
    words = refused(
        "quantize", tmp_path / "gpt2", "-o", tmp_path / "q", *FORMAT, "--calibration", text, *QUANTIZE, *how
    )  # fmt: skip
    assert "is a Conv1D in the float model: leave it in float with --skip, or leave out" in words
    assert [p.name for p in tmp_path.iterdir()] == ["gpt2"]
