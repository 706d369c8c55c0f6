"""Models that another tool quantized: every entry point refuses them in one sentence and leaves them unchanged."""

from __future__ import annotations

import copy
import json
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from smoothquant_kernels import (
    SmoothQuantConfig,
    calibrate_model,
    make_report,
    quantize_model,
    quantize_streamed,
    search_config,
    smooth_and_quantize,
    smooth_lm,
)
from smoothquant_kernels.evaluation.models import load_model
from smoothquant_kernels.modeling.foreign import check_float_config, check_float_model
from tests.support.checkpoints import IDS, llama, refusal


def fake_class(module: str, name: str, base: type) -> Any:
    """A class that claims to come from a package that is not installed."""
    return type(name, (base,), {"__module__": module})


def with_layer(layer: nn.Module) -> nn.Module:
    model = llama()
    model.get_submodule("model.layers.1.mlp").down_proj = layer
    return model


def with_buffers(cls_name: str, **buffers: torch.Tensor) -> nn.Module:
    layer: nn.Module = type(cls_name, (nn.Module,), {})()
    for name, value in buffers.items():
        layer.register_buffer(name, value)
    return layer


def with_weight(weight: Any, name: str = "Linear") -> nn.Module:
    layer = nn.Linear(4, 4, bias=False) if name == "Linear" else type(name, (nn.Module,), {})()
    layer._parameters["weight"] = weight
    return layer


def tensor_subclass() -> Any:
    cls = fake_class("torchao.dtypes.affine", "AffineTensor", torch.Tensor)
    return nn.Parameter(torch.randn(4, 4).as_subclass(cls), requires_grad=False)


PACKED = torch.zeros(4, 4, dtype=torch.int32)
FOREIGN: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "subclass of a tensor": (lambda: with_weight(tensor_subclass()), "torchao"),
    "bitsandbytes": (
        lambda: fake_class("bitsandbytes.nn.modules", "Linear8bitLt", nn.Linear)(4, 4),
        "bitsandbytes",
    ),
    "quanto, weights still float": (
        lambda: fake_class("optimum.quanto.nn.qlinear", "QLinear", nn.Linear)(4, 4),
        "optimum-quanto",
    ),
    "FP8 of transformers": (
        lambda: fake_class("transformers.integrations.finegrained_fp8", "FP8Linear", nn.Linear)(
            4, 4
        ),
        "FP8",
    ),
    "compressed": (lambda: with_buffers("CompressedLinear", weight_packed=PACKED), "compressed"),
    "HQQ": (lambda: with_buffers("HQQLinear", W_q=PACKED.to(torch.uint8)), "HQQ"),
    "GPTQ or AWQ": (lambda: with_buffers("QuantLinear", qweight=PACKED), "another tool"),
    "float8": (
        lambda: with_weight(nn.Parameter(torch.ones(4, 4).to(torch.float8_e4m3fn), False)),
        "another tool",
    ),
    "uint8": (
        lambda: with_weight(nn.Parameter(PACKED.to(torch.uint8), False), "PackedLinear"),
        "another tool",
    ),
    "int8": (lambda: with_weight(nn.Parameter(PACKED.to(torch.int8), False)), "another tool"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_the_error_names_the_tool_and_the_layer(kind: str) -> None:
    make, tool = FOREIGN[kind]
    model = with_layer(make())
    text = refusal(lambda: check_float_model(model))
    assert text.startswith(f"the model is quantized already by {tool}"), text
    assert "(model.layers.1.mlp.down_proj is a " in text
    assert text.endswith(": load the original float model.")


def test_fake_quantization_by_compressed_tensors_is_refused() -> None:
    model = llama()
    model.get_submodule("model.layers.0.mlp.up_proj").quantization_scheme = object()  # type: ignore[assignment]
    assert "by compressed-tensors (model.layers.0.mlp.up_proj" in refusal(
        lambda: check_float_model(model)
    )


def test_the_configuration_names_the_tool() -> None:
    model: Any = with_layer(with_buffers("QuantLinear", qweight=PACKED))
    model.config.quantization_config = {"quant_method": "gptq", "bits": 4}
    assert "quantized already by GPTQ (" in refusal(lambda: check_float_model(model))


def test_float_models_pass() -> None:
    check_float_model(llama())
    check_float_model(llama().to(torch.bfloat16))
    check_float_model(llama().double())
    scaled = with_layer(nn.Linear(64, 32))
    scaled.get_submodule("model.layers.1.mlp.down_proj").register_buffer(
        "weight_scale", torch.ones(1)
    )
    check_float_model(scaled)  # a scale of the user's own next to a float weight
    model: Any = llama()
    model.config.quantization_config = {"quant_method": "fp8"}
    check_float_model(model)  # transformers keeps this entry after dequantizing
    # Our own int8 layers get another error elsewhere.
    check_float_model(smooth_and_quantize(llama(), [IDS], progress=False))
    nn.utils.parametrizations.weight_norm(model.model.layers[0].mlp.up_proj)
    check_float_model(model)


ENTRIES: dict[str, Callable[[Any, Path], object]] = {
    "calibrate_model": lambda m, _: calibrate_model(m, [IDS], progress=False),
    "smooth_lm": lambda m, _: smooth_lm(m, [IDS], progress=False),
    "quantize_model": lambda m, _: quantize_model(m),
    "smooth_and_quantize": lambda m, _: smooth_and_quantize(m, [IDS], progress=False),
    "search_config": lambda m, _: search_config(m, [IDS] * 4, progress=False),
    "make_report": lambda m, path: make_report(
        m, [IDS], path / "report", held=[IDS], progress=False
    ),
}


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("whole", [False, True])
def test_every_entry_point_refuses(entry: str, whole: bool, tmp_path: Path) -> None:
    """Nothing is quantized again, whether one layer or all of them are quantized already."""
    if entry == "make_report":
        pytest.importorskip("matplotlib")
    model = llama()
    cls = fake_class("bitsandbytes.nn.modules", "Linear8bitLt", nn.Linear)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and (whole or name.endswith("1.mlp.down_proj")):
            module.__class__ = cls
    before = copy.deepcopy(model.state_dict())
    kinds = [type(m) for m in model.modules()]
    text = refusal(lambda: ENTRIES[entry](model, tmp_path))
    assert "quantized already by bitsandbytes" in text
    assert [type(m) for m in model.modules()] == kinds
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())


@pytest.mark.parametrize(
    ("values", "tool"),
    [
        ({"quantization_config": {"quant_method": "compressed-tensors"}}, "compressed-tensors"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "bitsandbytes"),
        ({"quantization_config": {"quant_method": "awq"}}, "AWQ"),
        ({"quantization_config": {}}, "another tool"),
        ({"compression_config": {"quant_method": "compressed-tensors"}}, "compressed-tensors"),
        ({"text_config": {"quantization_config": {"quant_method": "hqq"}}}, "HQQ"),
    ],
)
def test_a_configuration_is_enough_before_loading(values: Any, tool: str) -> None:
    text = refusal(lambda: check_float_config(values, "org/model"))
    assert text == f"org/model is quantized already by {tool}: give the original float model."
    text = refusal(lambda: check_float_config(types.SimpleNamespace(**values), "org/model"))
    assert f"by {tool}:" in text


def test_folders_are_refused_before_their_weights_are_read(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "m")
    path = tmp_path / "m" / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] = {"quant_method": "compressed-tensors"}
    path.write_text(json.dumps(config))
    (tmp_path / "m" / "model.safetensors").write_bytes(b"not read")
    assert "by compressed-tensors" in refusal(lambda: load_model(tmp_path / "m"))
    weights = {}
    from safetensors.torch import save_file

    save_file(weights, tmp_path / "m" / "model.safetensors")
    assert "by compressed-tensors" in refusal(
        lambda: quantize_streamed(tmp_path / "m", tmp_path / "q", [IDS], progress=False)
    )
    assert not (tmp_path / "q").exists()


def test_no_other_tool_is_imported() -> None:
    check_float_model(with_layer(nn.Linear(64, 32)))
    assert not {"bitsandbytes", "torchao", "compressed_tensors", "hqq"} & set(sys.modules)


def test_skip_does_not_hide_a_quantized_layer() -> None:
    model = with_layer(with_buffers("QuantLinear", qweight=PACKED))
    config = SmoothQuantConfig(skip=("*.down_proj",))
    assert "quantized already" in refusal(lambda: quantize_model(model, config=config))
