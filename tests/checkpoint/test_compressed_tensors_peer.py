"""The same with the real packages: compressed-tensors, and llm-compressor, which writes the checkpoints.

CI has neither. In an environment of its own: `pip install torch==2.13.0 llmcompressor pytest`, then `python -m pytest
tests/checkpoint/test_compressed_tensors_peer.py`. Run with llm-compressor 0.14.0.1, compressed-tensors 0.19.0 and
transformers 5.17.0, and (without llm-compressor) with compressed-tensors 0.20.1 and transformers 5.24.0.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from smoothquant_kernels import load_quantized
from smoothquant_kernels.checkpoint.compressed_tensors.scheme import parse
from smoothquant_kernels.checkpoint.hf_quantizer import Quantizer
from smoothquant_kernels.nn.linear import W8A8Linear
from smoothquant_kernels.nn.operands import QuantizedActivation
from tests.checkpoint.test_compressed_tensors import bound, int8_layers
from tests.support import compressed_tensors as ct
from tests.support.checkpoints import IDS, logits, refusal
from tests.support.command_line import word_tokenizer

pytest.importorskip("compressed_tensors")
METHOD = "compressed-tensors"
from_pretrained: Any = AutoModelForCausalLM.from_pretrained  # carries no annotations


def theirs(folder: Path) -> Any:
    """The model as transformers and compressed-tensors run it, after the first forward pass."""
    model = from_pretrained(folder, dtype=torch.float32)
    assert not int8_layers(model)
    model(IDS)
    return model


@pytest.mark.parametrize("granularity", ["channel", "tensor"])
@pytest.mark.parametrize("scheme", list(ct.INPUTS))
def test_each_layer_equals_theirs(scheme: str, granularity: str, tmp_path: Path) -> None:
    from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp

    folder = ct.simple(tmp_path / "model", scheme, granularity)
    peer = theirs(folder)
    generator = torch.Generator().manual_seed(0)
    for name, layer in int8_layers(load_quantized(folder)).items():
        other = peer.get_submodule(name)
        assert torch.equal(other.weight, layer.dequantized_weight())  # one product in both
        x = 2 * torch.randn(1, 9, layer.in_features, generator=generator)
        if scheme == "static":
            scale = other.input_scale
        else:
            inputs = other.quantization_scheme.input_activations
            scale, _ = compute_dynamic_scales_and_zp(value=x, args=inputs, module=other)
        codes = ct.their_codes(x, scale)[0]
        assert int((codes == -128).sum()) or scheme != "static"
        flat = scale.reshape(-1).float()
        ours = layer(QuantizedActivation(codes.to(torch.int8), flat, torch.float32))
        z = codes * flat[:, None]
        expected = other(x)[0]
        allowed = bound(z, layer.dequantized_weight(), layer.bias)
        assert bool(((ours - expected).abs() <= allowed).all()), name
        # and with its own quantizer, whose codes differ by at most one
        assert bool(((layer.quantize_input(x[0]).x_q - codes).abs() <= 1).all())


def test_the_same_layers_are_int8(tmp_path: Path) -> None:
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config

    static = ct.group(["re:.*mlp.*", "model.layers.0.self_attn.q_proj"], ct.STATIC)
    named = ct.group(["model.layers.0.mlp.up_proj", "re:.*self_attn.v_proj"], ct.TENSOR)
    config = ct.quantization_config(
        named, ct.group(["Linear"]), static, ignore=["lm_head", "re:.*layers\\.1\\.mlp"]
    )
    model: Any = ct.llama()
    apply_quantization_config(model, QuantizationConfig.model_validate(config))
    found = {}
    for name, module in model.named_modules():
        if (scheme := getattr(module, "quantization_scheme", None)) is not None:
            inputs = scheme.input_activations
            kind = "per_token" if inputs.strategy == "token" else "per_tensor"
            found[name] = kind if inputs.dynamic else "static"
    ours = {n: s.activation_scheme for n, s in parse(config).layers(ct.llama()).items()}
    assert ours == found and len(set(found.values())) == 3


def oneshot(folder: Path, **chosen: Any) -> Path:
    """A checkpoint of llm-compressor."""
    pytest.importorskip("llmcompressor")
    from datasets import Dataset
    from llmcompressor import oneshot as work
    from llmcompressor.modifiers.quantization import QuantizationModifier

    rows = {"input_ids": IDS.tolist(), "attention_mask": torch.ones_like(IDS).tolist()}
    original = folder.parent / "original"
    ct.llama().save_pretrained(original)  # type: ignore[operator]
    word_tokenizer().save_pretrained(original)
    model = from_pretrained(original)
    recipe = [QuantizationModifier(ignore=["lm_head"], **chosen)]
    sizes = {"num_calibration_samples": len(IDS), "max_seq_length": IDS.shape[1]}
    data = Dataset.from_dict(rows)
    work(model=model, dataset=data, recipe=recipe, **sizes)
    model.save_pretrained(folder, save_compressed=True)
    return folder


def groups(inputs: dict[str, Any], **weights: Any) -> dict[str, Any]:
    return {"config_groups": {"group_0": {
        "targets": ["Linear"], "weights": {**ct.WEIGHT, **weights}, "input_activations": inputs
    }}}  # fmt: skip


CASES = {
    "per_token": ("channel", {"targets": "Linear", "scheme": "W8A8"}),
    "static": ("tensor", groups(ct.STATIC, strategy="tensor")),
    "per_tensor": ("channel", groups(ct.TENSOR)),
}


@pytest.mark.parametrize("scheme", list(CASES))
def test_the_files_of_the_tests_are_those_of_llm_compressor(scheme: str, tmp_path: Path) -> None:
    granularity, chosen = CASES[scheme]
    real = oneshot(tmp_path / "real", **chosen)
    hand = ct.simple(tmp_path / "hand", scheme, granularity)
    configs = [
        json.loads((f / "config.json").read_text())["quantization_config"] for f in (real, hand)
    ]
    for config in configs:  # these do not decide what is computed
        del config["version"], config["format"]
        for arguments in config["config_groups"]["group_0"].values():
            if isinstance(arguments, dict):
                del arguments["observer"]
    assert configs[0] == configs[1]
    files = [load_file(folder / ct.WEIGHTS) for folder in (real, hand)]
    described = [{n: (t.dtype, t.shape) for n, t in file.items()} for file in files]
    assert described[0] == described[1]
    for name, tensor in files[0].items():
        if not name.endswith("input_scale"):
            assert close(tensor, files[1][name]), name
    ours, peer = load_quantized(real), theirs(real)
    # Both round inputs to int8 in their own way, so only the size of the difference tells something.
    assert float((logits(ours) - logits(peer)).abs().max()) < 0.1 * float(logits(peer).abs().max())


def close(a: Tensor, b: Tensor) -> bool:
    """Equal but for the roundings of a scale, and int8 values that lie on a tie."""
    if a.dtype == torch.int8:
        return (
            bool(((a.int() - b.int()).abs() <= 1).all()) and float((a != b).float().mean()) < 0.01
        )
    return torch.allclose(a, b, rtol=2.0**-22, atol=0)


@pytest.mark.parametrize("scheme", ["FP8_DYNAMIC", "W8A16", "W4A16"])
def test_other_formats_load_as_before(scheme: str, registered: None, tmp_path: Path) -> None:
    wide = {"strategy": "channel", "num_bits": 8 if scheme == "W8A16" else 4}
    chosen = {"targets": "Linear", "scheme": scheme}
    if scheme != "FP8_DYNAMIC":  # the presets need groups of 128
        chosen = groups(None, **wide)  # type: ignore[arg-type]
    folder = oneshot(tmp_path / "model", **chosen)
    model = from_pretrained(folder)
    assert type(model.hf_quantizer).__name__ == "CompressedTensorsHfQuantizer"
    assert not int8_layers(model)
    assert bool(logits(model).isfinite().all())
    assert "of the quantization_config" in refusal(lambda: load_quantized(folder))


def test_w8a8_stays_int8_and_nothing_is_left_of_their_quantizer(
    registered: None, tmp_path: Path
) -> None:
    folder = ct.simple(tmp_path / "model")
    model = from_pretrained(folder)
    assert type(model.hf_quantizer) is Quantizer  # which writes the folder as this package does
    for _ in range(2):
        logits(model)
    linears = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    assert linears == ["lm_head"]
    assert sum(isinstance(m, W8A8Linear) for m in model.modules()) == 14
    assert not any(hasattr(m, "quantization_scheme") for m in model.modules())


def test_asymmetric_activations_are_refused(tmp_path: Path) -> None:
    asymmetric = {**ct.STATIC, "symmetric": False}
    folder = oneshot(tmp_path / "model", **groups(asymmetric))
    assert any(n.endswith("input_zero_point") for n in load_file(folder / ct.WEIGHTS))
    assert "has asymmetric activations" in refusal(lambda: load_quantized(folder))
