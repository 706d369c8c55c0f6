"""`save_quantized(format="compressed-tensors")`: what is written, that it computes the same, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn

from smoothquant_kernels import (
    SmoothQuantConfig,
    W8A8Linear,
    load_quantized,
    quantize_model,
    save_quantized,
    smooth_and_quantize,
)
from smoothquant_kernels.checkpoint.compressed_tensors.export import exportable
from smoothquant_kernels.checkpoint.manifest import RECORD
from tests.support.checkpoints import IDS, assert_same_bits, contents, logits, refusal
from tests.support.models import GQA, make_model

FORMAT = "compressed-tensors"
WEIGHTS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}
TOKEN = {**WEIGHTS, "strategy": "token", "dynamic": True}
STATIC = {**WEIGHTS, "strategy": "tensor"}


def quantized(model: nn.Module, **settings: Any) -> Any:
    config = exportable(SmoothQuantConfig(**settings))
    return smooth_and_quantize(model, [IDS], config, progress=False)


def export(model: nn.Module, folder: Path, **options: Any) -> Path:
    return save_quantized(model, folder, format=FORMAT, **options)


def config_of(folder: Path) -> Any:
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def int8_layers(model: nn.Module) -> dict[str, W8A8Linear]:
    return {n: m for n, m in model.named_modules() if isinstance(m, W8A8Linear)}


def test_the_folder(tmp_path: Path) -> None:
    model = quantized(make_model("qwen2"), only_where_better=False)  # with biases of q, k and v
    folder = export(model, tmp_path / "q")
    names = {"config.json", "generation_config.json", "model.safetensors", RECORD}
    assert contents(folder).keys() == names
    assert config_of(folder) == {
        "quant_method": FORMAT,
        "format": "int-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": WEIGHTS,
                "input_activations": TOKEN,
                "output_activations": None,
            }
        },
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
    }
    tensors = load_file(folder / "model.safetensors")
    layers = int8_layers(model)
    assert len(layers) == 14
    for name, layer in layers.items():
        assert_same_bits(tensors.pop(f"{name}.weight"), layer.w_q)
        assert_same_bits(tensors.pop(f"{name}.weight_scale"), layer.w_scale[:, None])
        if layer.bias is not None:
            assert_same_bits(tensors.pop(f"{name}.bias"), layer.bias)
    state = model.state_dict()
    assert all(tensors[n].equal(state[n]) and tensors[n].dtype == torch.float32 for n in tensors)
    expected = make_model("qwen2").state_dict().keys()
    assert tensors.keys() == {n for n in expected if not n.startswith(tuple(layers))}
    assert load_quantized(folder).smoothquant_info == model.smoothquant_info
    record = json.loads((folder / RECORD).read_text())
    assert record["info"] == json.loads(json.dumps(model.smoothquant_info))
    assert record["format"] == FORMAT


@pytest.mark.parametrize(
    "damage",
    [
        lambda t: t[:100],
        lambda t: "[]",
        lambda t: '{"info": 3}',
        lambda t: '{"info": {"verification": {}}}',
        lambda t: '{"info": {"layers": [{"name": ["q"]}]}}',
        lambda t: '{"info": {"skipped": [{"name": "q", "reason": 1}]}}',
    ],
)
def test_a_damaged_record(damage: Callable[[str], str], tmp_path: Path) -> None:
    folder = export(quantized(make_model("llama")), tmp_path / "q")
    (folder / RECORD).write_text(damage((folder / RECORD).read_text()))
    assert "delete it, because only reports need it" in refusal(lambda: load_quantized(folder))


FAMILIES = ["llama_gqa", "qwen2", "qwen3", "opt", "bloom", "gpt_neox"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scheme", ["per_token", "static"])
def test_it_computes_the_same_bits(family: str, scheme: str, tmp_path: Path) -> None:
    """`load_quantized` reads the format as others wrote it, so nothing but the tensors and config.json is used."""
    model = quantized(make_model(family), activation_scheme=scheme, only_where_better=False)
    folder = export(model, tmp_path / "q")
    (folder / RECORD).unlink()
    loaded = load_quantized(folder)
    for name, layer in int8_layers(model).items():
        same = loaded.get_submodule(name)
        assert (same.activation_scheme, same.weight_granularity) == (
            layer.activation_scheme,
            "channel",
        )
        assert same.inv_smooth is None and not same.rotation
    assert_same_bits(logits(loaded), logits(model))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models(dtype: torch.dtype, tmp_path: Path) -> None:
    model = make_model("qwen2")
    for (
        parameter
    ) in model.parameters():  # as `from_pretrained` does it: rotary frequencies stay float32
        parameter.data = parameter.data.to(dtype)
    model = quantized(model, only_where_better=False)
    folder = export(model, tmp_path / "q")
    stored = load_file(folder / "model.safetensors")
    assert {t.dtype for n, t in stored.items() if n.endswith("weight_scale")} == {torch.float32}
    assert {t.dtype for n, t in stored.items() if n.endswith("bias")} == {dtype}
    assert_same_bits(logits(load_quantized(folder)), logits(model))


def test_layers_of_several_schemes_are_named(tmp_path: Path) -> None:
    own = {"*.1.mlp.down_proj": "per_token"}
    model = quantized(
        make_model("llama_gqa"), activation_scheme="static", schemes=own,
        weight_granularity="tensor", skip=("*.0.mlp.up_proj",),
    )  # fmt: skip
    folder = export(model, tmp_path / "q")
    config = config_of(folder)
    static, token = config["config_groups"]["group_0"], config["config_groups"]["group_1"]
    assert token["targets"] == ["model.layers.1.mlp.down_proj"]
    assert token["input_activations"] == TOKEN and static["input_activations"] == STATIC
    assert token["weights"] == static["weights"] == {**WEIGHTS, "strategy": "tensor"}
    assert sorted([*static["targets"], *token["targets"]]) == sorted(int8_layers(model))
    assert config["ignore"] == ["model.layers.0.mlp.up_proj", "lm_head"]
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.gate_proj"
    layer = model.get_submodule(name)
    assert_same_bits(tensors[f"{name}.input_scale"], layer.x_scale)
    assert_same_bits(tensors[f"{name}.weight_scale"], layer.w_scale)
    assert f"{token['targets'][0]}.input_scale" not in tensors
    assert_same_bits(logits(load_quantized(folder)), logits(model))


def test_shards_and_ties(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**GQA, tie_word_embeddings=True)
    model = quantized(transformers.LlamaForCausalLM(config).eval())
    folder = export(model, tmp_path / "q", max_shard_bytes=20_000)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = sorted(folder.glob("model-*.safetensors"))
    assert len(files) > 1 and files[0].name == f"model-00001-of-{len(files):05}.safetensors"
    assert set(index["weight_map"].values()) == {file.name for file in files}
    assert "lm_head.weight" not in index["weight_map"]
    for file in files:
        for name in load_file(file):
            assert index["weight_map"][name] == file.name
    assert index["metadata"]["total_size"] == sum(
        t.nbytes for file in files for t in load_file(file).values()
    )
    assert_same_bits(logits(load_quantized(folder)), logits(model))


def test_an_untied_copy_is_written(tmp_path: Path) -> None:
    """A head that shares its tensor by hand, although the configuration ties nothing."""
    model = make_model("llama")
    model.lm_head.weight = model.model.embed_tokens.weight
    model = quantized(model)
    tensors = load_file(export(model, tmp_path / "q") / "model.safetensors")
    assert tensors["lm_head.weight"].equal(tensors["model.embed_tokens.weight"])


def test_channels_of_zeros_have_a_scale_that_divides(tmp_path: Path) -> None:
    model = make_model("llama")
    model.model.layers[0].mlp.up_proj.weight.data[3] = 0
    model = quantized(model, smooth=False)
    name = "model.layers.0.mlp.up_proj"
    assert model.get_submodule(name).w_scale[3] == 0
    folder = export(model, tmp_path / "q")
    tensors = load_file(folder / "model.safetensors")
    assert tensors[f"{name}.weight_scale"][3] == 1 and not tensors[f"{name}.weight"][3].any()
    assert_same_bits(logits(load_quantized(folder)), logits(model))


@pytest.mark.parametrize("granularity", ["channel", "tensor"])
def test_the_shape_of_the_scale_of_one_channel(granularity: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**GQA, num_labels=1, pad_token_id=0)
    model = transformers.LlamaForSequenceClassification(config).eval()
    model = quantized(model, weight_granularity=granularity)
    folder = export(model, tmp_path / "q")
    scale = load_file(folder / "model.safetensors")["score.weight_scale"]
    assert list(scale.shape) == ([1, 1] if granularity == "channel" else [1])
    assert_same_bits(logits(load_quantized(folder)), logits(model))


@pytest.mark.skipif(transformers.__version__ < "5", reason="transformers 4 has one name for both")
def test_experts_have_the_names_that_are_published(tmp_path: Path) -> None:
    """transformers 5 joins the experts' weights in memory and publishes them one by one."""
    torch.manual_seed(0)
    config = transformers.MixtralConfig(**GQA, num_local_experts=2)
    model = transformers.MixtralForCausalLM(config).eval()
    model.save_pretrained(tmp_path / "float")
    plain = load_file(tmp_path / "float" / "model.safetensors")
    model = quantized(model, skip=("*.experts",))
    with pytest.warns(UserWarning, match="does not load the float experts"):
        folder = export(model, tmp_path / "q")
    # vLLM would look for int8 weights and scales of the experts, find none, and compute noise.
    assert config_of(folder)["ignore"] == ["lm_head", r"re:.*\.experts\.\d+\..*"]
    tensors = load_file(folder / "model.safetensors")
    scales = {n for n in tensors if n.endswith("_scale")}
    assert len(scales) == len(int8_layers(model)) == 8
    assert tensors.keys() - scales == plain.keys()
    experts = [n for n in plain if ".experts." in n]
    assert len(experts) == 12 and all(tensors[n].equal(plain[n]) for n in experts)


def test_nothing_is_left_after_an_error_and_folders_are_replaced_on_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = quantized(make_model("llama"))
    folder = export(model, tmp_path / "q")
    before = contents(folder)
    assert "exists already: pass overwrite=True" in refusal(lambda: export(model, folder))
    assert export(model, folder, overwrite=True) == folder and contents(folder) == before
    assert save_quantized(model, folder, overwrite=True) == folder  # the other format, and back
    assert export(model, folder, overwrite=True) == folder and contents(folder) == before
    from smoothquant_kernels.checkpoint import save

    monkeypatch.setattr(save, "write_safetensors", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export(model, folder, overwrite=True)
    assert contents(folder) == before and [p.name for p in tmp_path.iterdir()] == ["q"]


# --- refusals ---------------------------------------------------------------------------------------------------------


def native(**settings: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        model = make_model("llama_gqa")
        return smooth_and_quantize(model, [IDS], SmoothQuantConfig(**settings), progress=False)

    return make


def falcon() -> nn.Module:
    """Its linears multiply by themselves, where readers of the format replace what an `nn.Linear` does."""
    config = transformers.FalconConfig(
        vocab_size=131, hidden_size=32, num_hidden_layers=1, num_attention_heads=4
    )
    return quantized(transformers.FalconForCausalLM(config).eval(), smooth=False)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (native(), "model.layers.0.self_attn.q_proj rotates at run time, which compressed-tensors cannot"),
        (
            native(rotation="none", only_where_better=False),
            "o_proj divides by smoothing factors at run time, which compressed-tensors cannot express: quantize the "
            "float model with SmoothQuantConfig(folding='only', rotation='none'), "
            "or save the native format.",
        ),
        (
            native(rotation="none", folding="only", activation_scheme="per_tensor"),
            "vLLM has no per_tensor activations (one dynamic scale for the whole tensor)",
        ),
        (
            native(rotation="none", folding="only", quantize_head=True),
            "lm_head is an int8 output head, and readers of compressed-tensors keep the head in float",
        ),
        (
            lambda: quantized(make_model("gpt2")),
            "quantizes nn.Linear only, and transformer.h.0.attn.c_attn is a Conv1D in the float model: name it in skip",
        ),
        (falcon, "h.0.self_attention.query_key_value is a FalconLinear in the float model: name it in skip"),
        (lambda: make_model("llama"), "the model has no quantized layer: run quantize_model on it first"),
    ],
)  # fmt: skip
def test_what_the_format_cannot_express(
    make: Callable[[], nn.Module], words: str, tmp_path: Path
) -> None:
    assert words in refusal(lambda: export(make(), tmp_path / "q"))
    assert not list(tmp_path.iterdir())


def test_models_that_transformers_does_not_make(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    model = quantize_model(model, config=exportable(SmoothQuantConfig()))
    assert "Sequential is not one" in refusal(lambda: export(model, tmp_path / "q"))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"rotation": 64}, "has no rotation before a quantizer, and the settings ask for 64"),
        ({"rotations": {"*.o_proj": 32}}, "the settings ask for 32"),
        ({"activation_scheme": "per_tensor"}, "vLLM has no per_tensor activations"),
        ({"schemes": {"*.o_proj": "per_tensor"}}, "vLLM has no per_tensor activations"),
        ({"quantize_head": True}, "keep the output head in float: leave out quantize_head"),
    ],
)
def test_settings_that_the_format_lacks(settings: dict[str, Any], words: str) -> None:
    assert words in refusal(lambda: exportable(SmoothQuantConfig(**settings)))


def test_settings_for_the_format() -> None:
    config = SmoothQuantConfig(alpha=0.4, rotations={"*": "none"}, schemes={"*.o_proj": "static"})
    expected = config.replace(folding="only", rotation="none", rotations={})
    assert exportable(config) == expected
    assert exportable(config, strict=True) == expected.replace(folding="required")


def test_another_format_is_refused(tmp_path: Path) -> None:
    words = refusal(lambda: save_quantized(native()(), tmp_path / "q", format="gguf"))
    assert words == "format must be one of native, compressed-tensors; got 'gguf'."


def test_layers_that_transformers_would_publish_in_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    conversions = pytest.importorskip("transformers.core_model_loading")

    def cut(_: Any, state: dict[str, Any]) -> dict[str, Any]:
        name = "model.layers.0.mlp.up_proj.weight"
        halves = state.pop(name).chunk(2)
        return {**state, f"{name}.a": halves[0], f"{name}.b": halves[1]}

    monkeypatch.setattr(conversions, "revert_weight_conversion", cut)
    model = quantized(make_model("llama"))
    words = refusal(lambda: export(model, tmp_path / "q"))
    assert words.startswith(
        "transformers publishes model.layers.0.mlp.up_proj.weight in another form"
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(transformers.__version__ < "5", reason="transformers 4 joins nothing")
def test_joined_experts_are_left_to_transformers(registered: None, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.MixtralConfig(**GQA, num_local_experts=2)
    model = quantized(transformers.MixtralForCausalLM(config).eval(), skip=("*.experts",))
    folder = export(model, tmp_path / "q")
    words = refusal(lambda: load_quantized(folder))
    assert (
        "in several tensors, which transformers joins when it loads: use from_pretrained" in words
    )
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert int8_layers(loaded).keys() == int8_layers(model).keys()
    assert_same_bits(logits(loaded), logits(model))
