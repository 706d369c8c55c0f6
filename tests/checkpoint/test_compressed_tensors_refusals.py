"""What the int8 layers do not compute, and damaged checkpoints of compressed-tensors, are refused in one sentence."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from smoothquant_kernels import load_quantized
from smoothquant_kernels.checkpoint import foreign_folder
from smoothquant_kernels.checkpoint.compressed_tensors.scheme import parse
from tests.support import compressed_tensors as ct
from tests.support import models
from tests.support.checkpoints import refusal
from tests.support.command_line import Result

LAYER = "model.layers.0.mlp.up_proj"  # [88, 32]


def grouped(**changed: Any) -> dict[str, Any]:
    return ct.quantization_config({**ct.group(["Linear"]), **changed})


def weights(**changed: Any) -> dict[str, Any]:
    return grouped(weights={**ct.WEIGHT, **changed})


def inputs(**changed: Any) -> dict[str, Any]:
    return grouped(input_activations={**ct.TOKEN, **changed})


#: A quantization_config -> a part of the sentence.
CONFIGS: list[tuple[dict[str, Any], str]] = [
    (weights(num_bits=4), "has weights of 4 bits (type int), not int8"),
    (weights(type="float"), "has weights of 8 bits (type float), not int8"),
    (weights(num_bits=True), "has weights of True bits"),
    (weights(strategy="group", group_size=128), "has weight scales by group"),
    (weights(strategy="block", block_structure=[128, 128]), "has weight scales by block"),
    (weights(strategy=None, group_size=64), "has weight scales by group"),
    (weights(symmetric=False), "has asymmetric weights (a zero point)"),
    (weights(dynamic=True), "has dynamic weights"),
    (weights(surprise=1), "must be known entries, which are actorder"),
    (inputs(symmetric=False), "has asymmetric activations (a zero point)"),
    (inputs(num_bits=4), "has activations of 4 bits"),
    (inputs(type="float"), "has activations of 8 bits (type float)"),
    (inputs(strategy="group", group_size=128), "has dynamic activation scales by group"),
    (inputs(dynamic=False), "has static activation scales by token"),
    (
        inputs(dynamic="local", strategy="tensor_group"),
        "has local activation scales by tensor_group",
    ),
    (inputs(dynamic=[], strategy="tensor_group"), "has [] activation scales by tensor_group"),
    (inputs(surprise=1), "must be known entries"),
    (grouped(input_activations=None), "quantizes weights alone (W8A16)"),
    (grouped(weights=None), "does not quantize weights"),
    (grouped(output_activations=ct.TENSOR), "quantizes the outputs of layers"),
    (grouped(format="pack-quantized"), "has the format 'pack-quantized'"),
    (grouped(surprise=1), "must be known entries, which are format"),
    (grouped(targets=[]), "group_0.targets of the quantization_config must be names"),
    (grouped(targets=["re:("]), "valid re: patterns"),
    (grouped(targets=["re:a{99999999999}"]), "valid re: patterns"),
    (grouped(targets=["re:" + "(" * 5000 + ")" * 5000]), "valid re: patterns"),
    (grouped(weights="int8"), "group_0.weights of the quantization_config must be an object"),
    ({**grouped(), "format": "marlin-24"}, "the checkpoint has the format 'marlin-24'"),
    ({**grouped(), "ignore": "lm_head"}, "ignore of the quantization_config must be a list"),
    ({**grouped(), "config_groups": {}}, "config_groups of the quantization_config must be"),
    ({**grouped(), "config_groups": {"W8A8": ["Linear"]}}, "config_groups.W8A8"),
    (
        {**grouped(), "quantization_status": "melted"},
        "quantization_status of the quantization_config",
    ),
    (
        {**grouped(), "kv_cache_scheme": {"num_bits": 8}},
        "kv_cache_scheme: it quantizes the key and",
    ),
    (
        {**grouped(), "sparsity_config": {"format": "x"}},
        "sparsity_config: it stores sparse weights",
    ),
    ({**grouped(), "transform_config": {"x": {}}}, "transform_config: it rotates activations"),
]


@pytest.mark.parametrize(("config", "expected"), CONFIGS, ids=[part for _, part in CONFIGS])
def test_a_configuration_is_refused(config: dict[str, Any], expected: str) -> None:
    assert expected in refusal(lambda: parse(config))


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ct.simple(tmp_path_factory.mktemp("ct") / "static", "static")


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    copied = tmp_path / "copied"
    copied.mkdir()
    for file in original.iterdir():
        (copied / file.name).write_bytes(file.read_bytes())
    return copied


def changed(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], None]:
    def rewrite(tensors: dict[str, Tensor]) -> None:
        tensors[name] = change(tensors[name])

    return rewrite


def filled(value: float) -> Callable[[Tensor], Tensor]:
    def change(t: Tensor) -> Tensor:
        t.view(-1)[-1] = value
        return t

    return change


def without(name: str) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: (tensors.pop(name), None)[1]


def extra(name: str, dtype: torch.dtype = torch.float32) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.update({name: torch.ones(1, dtype=dtype)})


def half(t: Tensor) -> Tensor:
    return t[: len(t) // 2].contiguous()


SCALE, INPUT, W = f"{LAYER}.weight_scale", f"{LAYER}.input_scale", f"{LAYER}.weight"
#: A change of the tensors -> a part of the sentence.
TENSORS: list[tuple[Callable[[dict[str, Tensor]], None], str]] = [
    (without(SCALE), f"{LAYER} is int8 by the quantization_config and has no weight_scale"),
    (without(INPUT), f"{LAYER} is int8 by the quantization_config and has no input_scale"),
    (without(W), f"{LAYER} is int8 by the quantization_config and has no weight in"),
    (changed(SCALE, half), "weight_scale is float32 [44, 1], and this static layer"),
    (changed(SCALE, lambda t: t.t().contiguous()), "weight_scale is float32 [1, 88], and"),
    (changed(SCALE, lambda t: t[:1].contiguous()), "weight_scale is float32 [1, 1], and"),
    (changed(SCALE, lambda t: t.double()), "weight_scale is float64 [88, 1], and"),
    (changed(INPUT, lambda t: t.repeat(2)), "input_scale is float32 [2], and"),
    (changed(W, lambda t: t.float()), "weight is float32 [88, 32], and"),
    (changed(W, lambda t: t.view(torch.uint8)), "weight is uint8 [88, 32], and"),
    (changed(W, half), "weight is int8 [44, 32], and"),
    (
        changed(SCALE, filled(-1.0)),
        f"{LAYER}.w_scale has a value that is NaN, infinite or negative",
    ),
    (changed(SCALE, filled(float("nan"))), f"{LAYER}.w_scale has a value that is NaN"),
    (changed(SCALE, filled(float("inf"))), f"{LAYER}.w_scale has a value that is NaN"),
    (changed(INPUT, filled(0.0)), f"{LAYER}.x_scale has a value that is NaN, infinite or not pos"),
    (changed(INPUT, filled(-1.0)), f"{LAYER}.x_scale has a value that is NaN"),
    (without("model.norm.weight"), "model.norm.weight is not in the files"),
    (extra("model.more"), "it has no tensor model.more"),
    (extra(f"{LAYER}.weight_g_idx"), f"{LAYER}.weight_g_idx is no tensor of"),
    (
        extra("model.layers.0.self_attn.k_scale"),
        "it has no tensor model.layers.0.self_attn.k_scale",
    ),
    (changed("model.norm.weight", half), "model.norm.weight has shape [32] there, not [16]"),
    (
        changed("lm_head.weight", lambda t: t.to(torch.int8)),
        "lm_head.weight is int8 in the files and its layer is in float",
    ),
    (
        changed("model.norm.weight", lambda t: t.to(torch.int64)),
        "model.norm.weight is torch.float32",
    ),
]


@pytest.mark.parametrize(("change", "expected"), TENSORS, ids=[part for _, part in TENSORS])
def test_tensors_are_refused(
    change: Callable[[dict[str, Tensor]], None], expected: str, folder: Path
) -> None:
    ct.rewrite_tensors(folder, change)
    assert expected in refusal(lambda: load_quantized(folder))


def test_a_scale_of_zero_belongs_to_a_channel_of_zeros(folder: Path) -> None:
    """As in the own format: such a channel is 0, whatever its int8 values."""
    ct.rewrite_tensors(folder, changed(SCALE, filled(0.0)))
    layer: Any = load_quantized(folder).get_submodule(LAYER)
    assert float(layer.w_scale[-1]) == 0.0
    assert not bool(layer(torch.randn(3, 32))[:, -1].any())


def test_a_frozen_model_with_float_weights_is_refused(folder: Path) -> None:
    ct.rewrite_config(
        folder, lambda v: v["quantization_config"].update(quantization_status="frozen")
    )
    ct.rewrite_tensors(folder, changed(W, lambda t: t.float()))
    assert "needs int8 [88, 32]: quantize the model again" in refusal(
        lambda: load_quantized(folder)
    )


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (["Conv2d"], "the target 'Conv2d' of the quantization_config matches no linear layer"),
        (
            ["Linear", "re:.*nothing"],
            "the target 're:.*nothing' of the quantization_config matches",
        ),
        (["Embedding"], "makes model.embed_tokens int8, which is a Embedding and not an nn.Linear"),
        (["re:.*embed.*"], "makes model.embed_tokens int8, which is a Embedding"),
        (["LlamaAttention"], "makes model.layers.0.self_attn int8, which is a LlamaAttention"),
        (["model.layers.0.mlp"], "makes model.layers.0.mlp int8, which is a LlamaMLP"),
    ],
)
def test_targets_are_refused(targets: list[str], expected: str, folder: Path) -> None:
    config = ct.quantization_config(ct.group(targets, ct.STATIC))
    ct.rewrite_config(folder, lambda values: values.update(quantization_config=config))
    assert expected in refusal(lambda: load_quantized(folder))


def test_layers_that_are_no_nn_linear_are_refused() -> None:
    """GPT-2's Conv1D has its weight transposed, and compressed-tensors leaves it in float."""
    model = transformers.GPT2LMHeadModel(models.CONFIGS["gpt2"]())
    for targets, expected in (
        (["Conv1D"], "makes transformer.h.0.attn.c_attn int8, which is a Conv1D and not"),
        (["re:.*mlp.c_fc"], "makes transformer.h.0.mlp.c_fc int8, which is a Conv1D"),
        (["Linear"], "makes no layer of the GPT2LMHeadModel int8, because it ignores all that it"),
    ):
        config = parse(ct.quantization_config(ct.group(targets)))
        assert expected in refusal(lambda c=config: c.layers(model))  # type: ignore[misc]


def test_a_linear_with_a_forward_of_its_own_is_refused(folder: Path) -> None:
    class Twice(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    model = ct.llama()
    model.get_submodule("model.layers.0.mlp").up_proj = Twice(32, 88, bias=False)
    message = refusal(lambda: load_quantized(folder, model=model))
    assert (
        f"the target 'Linear' makes {LAYER} int8, which is a Twice and not an nn.Linear" in message
    )
    assert isinstance(model.get_submodule("model.layers.0.mlp.gate_proj"), nn.Linear)  # unchanged


def test_a_refusal_leaves_a_given_model_unchanged(folder: Path) -> None:
    model = ct.llama()
    before = {name: (id(t), t._version) for name, t in model.state_dict(keep_vars=True).items()}
    ct.rewrite_tensors(folder, changed(INPUT, filled(0.0)))
    refusal(lambda: load_quantized(folder, model=model))
    after = {name: (id(t), t._version) for name, t in model.state_dict(keep_vars=True).items()}
    assert after == before and not hasattr(model, "smoothquant_info")


def test_weight_files_are_refused(folder: Path, original: Path, tmp_path: Path) -> None:
    weights = folder / ct.WEIGHTS
    data = weights.read_bytes()
    weights.write_bytes(data[:-1])
    assert f"{weights} cannot be read" in refusal(lambda: load_quantized(folder))
    weights.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"a pickle")
    message = refusal(lambda: load_quantized(folder))
    assert "has neither model.safetensors nor model.safetensors.index.json" in message
    index = folder / f"{ct.WEIGHTS}.index.json"
    for text, expected in (
        ("{", "cannot be read"),
        ('{"weight_map": []}', "cannot be read"),
        ('{"weight_map": {"a": "../model.safetensors"}}', "names the file '../model.safetensors'"),
        ('{"weight_map": {"a": "model.bin"}}', "names the file 'model.bin'"),
        ('{"weight_map": {"a": "none.safetensors"}}', "none.safetensors cannot be read"),
    ):
        index.write_text(text)
        assert expected in refusal(lambda: load_quantized(folder))
    (folder / "part.safetensors").write_bytes(data)
    index.write_text('{"weight_map": {"lm_head.weight": "part.safetensors"}}')
    assert "and the weight files differ at" in refusal(lambda: load_quantized(folder))


def test_the_class_of_the_model_is_needed(folder: Path) -> None:
    for architectures, expected in (
        (None, "must name the class of the model"),
        (["Model", "Other"], "must name the class of the model"),
        (["NoSuchModel"], "has no model class NoSuchModel"),
    ):
        ct.rewrite_config(folder, lambda v, a=architectures: v.update(architectures=a))  # type: ignore[misc]
        assert expected in refusal(lambda: load_quantized(folder))


def test_code_named_by_the_folder_never_runs(folder: Path) -> None:
    (folder / "modeling_evil.py").write_text("raise RuntimeError('ran')")
    auto = {"AutoModelForCausalLM": "modeling_evil.Evil", "AutoConfig": "modeling_evil.Config"}
    ct.rewrite_config(folder, lambda values: values.update(auto_map=auto))
    assert type(load_quantized(folder)).__name__ == "LlamaForCausalLM"


# ------------------------------------------------------------------------------ other methods


@pytest.mark.parametrize("method", [*foreign_folder._INSTEAD, "unheard_of"])
def test_other_methods_are_refused_by_name(method: str, folder: Path) -> None:
    key = "quantization_config"
    config: dict[str, Any] = {"quant_method": method}
    if method == "compression_config":
        key = method
        ct.rewrite_config(folder, lambda values: values.pop("quantization_config"))
    elif method == "bitsandbytes":
        config = {"load_in_8bit": True}
    ct.rewrite_config(folder, lambda values: values.update({key: config}))
    message = refusal(lambda: load_quantized(folder))
    tool = foreign_folder._INSTEAD.get(method, (method, ""))[0]
    assert f"{folder} is quantized by {tool}, whose layers are not those of this package" in message


def test_a_float_folder_is_no_checkpoint(folder: Path) -> None:
    ct.rewrite_config(folder, lambda values: values.pop("quantization_config"))
    assert "is not a checkpoint of this package" in refusal(lambda: load_quantized(folder))
    ct.rewrite_config(
        folder, lambda v: v.update(quantization_config={"quant_method": "smoothquant_kernels"})
    )
    assert "is not a checkpoint of this package" in refusal(lambda: load_quantized(folder))


@pytest.mark.parametrize("command", ["inspect", "generate", "evaluate"])
def test_a_refusal_on_the_command_line(command: str, folder: Path) -> None:
    ct.rewrite_config(folder, lambda v: v["quantization_config"].update(kv_cache_scheme={"a": 1}))
    more = {"inspect": (), "generate": ("-p", "a"), "evaluate": ()}[command]
    result = Result(command, folder, *more)
    assert result.code == 2
    assert "Error: the checkpoint has a kv_cache_scheme" in result.err
    assert json.loads((folder / "config.json").read_text())["architectures"]
