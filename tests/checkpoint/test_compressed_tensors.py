"""W8A8 checkpoints of llm-compressor become int8 layers that compute what compressed-tensors does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from smoothquant_kernels import load_quantized, reference, save_quantized
from smoothquant_kernels.backends import cpu_native
from smoothquant_kernels.checkpoint.compressed_tensors.scheme import Scheme, is_w8a8, parse
from smoothquant_kernels.modeling.record import ModelRecord, Reason
from smoothquant_kernels.nn.kinds import is_quantized
from smoothquant_kernels.nn.linear import W8A8Linear
from smoothquant_kernels.nn.operands import QuantizedActivation
from tests.support import compressed_tensors as ct
from tests.support.backends import at_level, kernels_in_python
from tests.support.checkpoints import IDS, assert_same_bits, logits, refusal
from tests.support.command_line import Result

SCHEMES = [(s, g) for s in ct.INPUTS for g in ("channel", "tensor")]
U = 2.0**-24  # half a unit in the last place of 1 in float32


def int8_layers(model: nn.Module) -> dict[str, W8A8Linear]:
    return {n: m for n, m in model.named_modules() if isinstance(m, W8A8Linear)}


# ------------------------------------------------------------------------------ what is read


@pytest.mark.parametrize(("scheme", "granularity"), SCHEMES)
@pytest.mark.parametrize("shards", [1, 3])
def test_every_tensor_is_read_exactly(
    scheme: str, granularity: str, shards: int, tmp_path: Path
) -> None:
    folder = ct.simple(tmp_path / "model", scheme, granularity, shards=shards)
    stored: dict[str, Tensor] = {}
    for file in folder.glob("*.safetensors"):
        stored |= load_file(file)
    model = load_quantized(folder)
    layers = int8_layers(model)
    assert len(layers) == 14 and not model.training
    for name, layer in layers.items():
        assert torch.equal(layer.w_q, stored.pop(f"{name}.weight"))
        assert int(layer.w_q.int().abs().max()) >= 127
        assert torch.equal(layer.w_scale, stored.pop(f"{name}.weight_scale").flatten())
        assert layer.activation_scheme == scheme and layer.weight_granularity == granularity
        if scheme == "static":
            assert layer.x_scale is not None
            assert torch.equal(layer.x_scale, stored.pop(f"{name}.input_scale"))
        if layer.bias is not None:
            assert torch.equal(layer.bias, stored.pop(f"{name}.bias"))
    state = model.state_dict()
    for name, tensor in stored.items():  # all others
        assert torch.equal(state[name], tensor), name
    assert all(t.data_ptr() % 64 == 0 for t in (*model.parameters(), *model.buffers()))
    assert bool(logits(model).isfinite().all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scales_of_half_types_become_float32_exactly(dtype: torch.dtype, tmp_path: Path) -> None:
    folder = ct.simple(tmp_path / "model", "static", model=ct.llama().to(dtype))
    stored = load_file(folder / ct.WEIGHTS)
    model = load_quantized(folder)
    for name, layer in int8_layers(model).items():
        scale = stored[f"{name}.weight_scale"]
        assert (
            scale.dtype == dtype and layer.dtype == dtype and layer.w_scale.dtype == torch.float32
        )
        assert torch.equal(layer.w_scale, scale.double().flatten().float())
    assert model.get_submodule("model.norm").weight.dtype == dtype
    assert logits(model).dtype == dtype


def test_flat_and_scalar_scales_are_the_same(tmp_path: Path) -> None:
    folder = ct.simple(tmp_path / "model", "static", "channel")
    expected = logits(load_quantized(folder))

    def flatten(tensors: dict[str, Tensor]) -> None:
        for name, t in tensors.items():
            if name.endswith("weight_scale"):
                tensors[name] = t.flatten()
            elif name.endswith("input_scale"):
                tensors[name] = t.reshape(())

    ct.rewrite_tensors(folder, flatten)
    assert_same_bits(logits(load_quantized(folder)), expected)


def test_tied_embeddings_stay_one_parameter(tmp_path: Path) -> None:
    tied = ct.llama(tie_word_embeddings=True)
    folder = ct.simple(tmp_path / "model", model=tied)
    assert "lm_head.weight" not in load_file(folder / ct.WEIGHTS)
    model: Any = load_quantized(folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, tied.lm_head.weight)  # type: ignore[attr-defined, arg-type]
    assert_same_bits(
        logits(load_quantized(folder, model=ct.llama(tie_word_embeddings=True))), logits(model)
    )


def test_an_int8_head_is_kept_apart_from_the_embedding(tmp_path: Path) -> None:
    config = ct.quantization_config(ignore=[])
    model: Any = ct.llama(tie_word_embeddings=True)
    folder = ct.write(tmp_path / "model", model, lambda name: ("per_token", "channel"), config)
    loaded: Any = load_quantized(folder)
    assert is_quantized(loaded.lm_head)
    assert torch.equal(loaded.model.embed_tokens.weight, model.model.embed_tokens.weight)
    loaded.tie_weights()
    assert is_quantized(loaded.lm_head) and loaded.lm_head.w_q.dtype == torch.int8


def test_groups_names_patterns_and_ignored_layers(tmp_path: Path) -> None:
    """A name counts before a pattern, a pattern before a class, and `ignore` before all."""
    static = ct.group(["re:.*mlp.*", "model.layers.0.self_attn.q_proj"], ct.STATIC)
    static["weights"]["strategy"] = "tensor"
    named = ct.group(["model.layers.0.mlp.up_proj"], ct.TENSOR)
    config = ct.quantization_config(
        ct.group(["Linear"]), static, named, ignore=["lm_head", "re:.*layers\\.1\\.mlp", "no_such"]
    )
    expected: dict[str, tuple[str, str] | None] = {"lm_head": None}
    for i, leaf in ((i, n) for i in (0, 1) for n in ("gate_proj", "up_proj", "down_proj")):
        expected[f"model.layers.{i}.mlp.{leaf}"] = None if i else ("static", "tensor")
    expected["model.layers.0.self_attn.q_proj"] = "static", "tensor"
    expected["model.layers.0.mlp.up_proj"] = "per_tensor", "channel"
    folder = ct.write(
        tmp_path / "model", ct.llama(), lambda n: expected.get(n, ("per_token", "channel")), config
    )
    model = load_quantized(folder)
    found = {n: (m.activation_scheme, m.weight_granularity) for n, m in int8_layers(model).items()}
    float_layers = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    assert sorted(float_layers) == sorted(n for n, chosen in expected.items() if chosen is None)
    assert found == {n: expected.get(n, ("per_token", "channel")) for n in found}

    record = ModelRecord.of(model)
    assert {layer.name: layer.activation_scheme for layer in record.layers} == {
        n: scheme for n, (scheme, _) in found.items()
    }
    assert {layer.reason for layer in record.layers} == {Reason.IMPORTED()}
    assert {s.name: Reason.of(s.reason) for s in record.skipped} == {
        n: Reason.OUTPUT_HEAD if n == "lm_head" else Reason.FLOAT_IN_CHECKPOINT
        for n in float_layers
    }


def test_the_scheme_of_the_configuration() -> None:
    parsed = parse(ct.quantization_config(ct.group(["Linear"], ct.STATIC)))
    assert parsed.targets == {"Linear": Scheme("static", "channel")}
    assert parsed.ignore == ("lm_head",) and parsed.version == "0.19.0"
    # what compressed-tensors assumes where nothing is written
    short = {"targets": ["Linear"], "weights": {}, "input_activations": {"dynamic": True}}
    minimal = {"quant_method": "compressed-tensors", "config_groups": {"g": short}}
    assert parse(minimal).targets == {"Linear": Scheme("per_tensor", "tensor")}


@pytest.mark.parametrize("state", ["frozen", "compressed", "initialized"])
def test_int8_weights_are_read_as_such_whatever_the_state_says(state: str, tmp_path: Path) -> None:
    """Others take the int8 values of a "frozen" model for its weights, without the scales."""
    folder = ct.simple(tmp_path / "model")
    expected = logits(load_quantized(folder))
    ct.rewrite_config(folder, lambda v: v["quantization_config"].update(quantization_status=state))
    assert_same_bits(logits(load_quantized(folder)), expected)


def test_zero_points_of_zero_are_read(tmp_path: Path) -> None:
    """Other releases write them for symmetric layers."""
    folder = ct.simple(tmp_path / "model", "static")
    expected = logits(load_quantized(folder))
    name = "model.layers.0.mlp.up_proj"
    zeros = {
        f"{name}.weight_zero_point": torch.zeros(88, 1, dtype=torch.int8),
        f"{name}.input_zero_point": torch.zeros(1, dtype=torch.int8),
    }
    ct.rewrite_tensors(folder, lambda tensors: tensors.update(zeros))
    assert_same_bits(logits(load_quantized(folder)), expected)
    zeros[f"{name}.input_zero_point"] += 3
    ct.rewrite_tensors(folder, lambda tensors: tensors.update(zeros))
    message = refusal(lambda: load_quantized(folder))
    assert f"{name}.input_zero_point is not 0 and the quantization_config says symmetric" in message


# ------------------------------------------------------------------------------ what is computed


def bound(x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    """How far two float32 evaluations of x [M, K] @ w.T + bias may be apart if their int8 values agree.

    compressed-tensors rounds each product of a code and its scale, on both sides (2 roundings), the product of both,
    and K additions with the bias. The kernels add exactly and round 3 times. In all K + 6 roundings of U, relative to
    the sum of the magnitudes; 1.01 for the products of these.
    """
    total = x.abs().double() @ w.abs().double().T
    if bias is not None:
        total = total + bias.abs().double()
    return 1.01 * (x.shape[-1] + 6) * U * total


@pytest.mark.parametrize("granularity", ["channel", "tensor"])
def test_a_layer_equals_compressed_tensors_on_the_same_int8_input(
    granularity: str, tmp_path: Path
) -> None:
    folder = ct.simple(tmp_path / "model", "static", granularity)
    stored = load_file(folder / ct.WEIGHTS)
    generator = torch.Generator().manual_seed(0)
    for name, layer in int8_layers(load_quantized(folder)).items():
        k = layer.in_features
        codes = torch.randint(-128, 128, (9, k), generator=generator, dtype=torch.int8)
        scale = torch.rand(9, generator=generator) + 0.01
        theirs = ct.their_forward(
            codes.float() * scale[:, None],
            scale[:, None],
            stored[f"{name}.weight"],
            stored[f"{name}.weight_scale"],
            layer.bias,
        )
        ours = layer(QuantizedActivation(codes, scale, torch.float32))
        allowed = bound(codes * scale[:, None], layer.dequantized_weight(), layer.bias)
        assert bool(((ours - theirs).abs() <= allowed).all()), name


def test_a_static_scale_saturates_one_code_earlier(tmp_path: Path) -> None:
    """compressed-tensors has one more code, -128, for values below -127.5 scales; all others agree up to ties.

    A tie: x * (1 / scale) and x / scale differ by less than 3 roundings, so they may fall on both sides of a half. A
    layer's output then differs by at most w_scale * x_scale * |w_q| for each of these codes.
    """
    folder = ct.simple(tmp_path / "model", "static")
    stored = load_file(folder / ct.WEIGHTS)
    seen = 0
    for name, layer in int8_layers(load_quantized(folder)).items():
        scale = layer.x_scale
        assert scale is not None
        x = 1.2 * 128 * scale * (2 * torch.rand(17, layer.in_features) - 1)
        x[0], x[1] = -200 * scale, -127.4 * scale
        ours = layer.quantize_input(x).x_q.double()
        theirs = ct.their_codes(x, scale).double()
        below = theirs == -128
        assert torch.equal(ours[below], torch.full_like(ours[below], -127))
        exact = x.double() / scale.double()
        tie = (exact - exact.floor() - 0.5).abs() <= 3 * U * exact.abs()
        assert torch.equal(ours[~below & ~tie], theirs[~below & ~tie])
        assert bool(((ours - theirs).abs() <= 1).all())
        assert int(below.sum()) > layer.in_features
        seen += int(below.sum())

        w_scale = stored[f"{name}.weight_scale"]
        w_q = stored[f"{name}.weight"]
        y = ct.their_forward(x, scale, w_q, w_scale, layer.bias)
        one_code = (ours != theirs).double() @ w_q.double().abs().T
        allowed = one_code * w_scale.double().T * scale.double() * (1 + 4 * U)
        allowed += bound(128 * scale * torch.ones_like(x), layer.dequantized_weight(), layer.bias)
        assert bool(((layer(x) - y).abs() <= allowed).all()), name
        assert bool((layer(x)[0] != y[0]).any())  # a row of -128: the bound is not slack
    assert seen


def test_dynamic_codes_differ_from_theirs_by_at_most_one(tmp_path: Path) -> None:
    """Their scale is absmax / 127.5 in [-128, 127], ours absmax / 127: |x| (127.5 - 127) / absmax <= 0.5, so rounding
    moves a code by at most one; the largest gets 127 or -128 there and 127 or -127 here."""
    layer = int8_layers(load_quantized(ct.simple(tmp_path / "model")))["model.layers.0.mlp.up_proj"]
    x = torch.randn(300, layer.in_features, generator=torch.Generator().manual_seed(1))
    ours = layer.quantize_input(x).x_q.float()
    theirs = ct.their_codes(x, x.abs().amax(1, keepdim=True) / 127.5)
    assert bool(((ours - theirs).abs() <= 1).all()) and bool((ours != theirs).any())


def layer_of(w_q: Tensor, folder: Path) -> W8A8Linear:
    """A layer of the largest K with this weight, read from a file."""
    n, k = w_q.shape
    model = nn.Sequential(nn.Linear(k, n, bias=False))
    folder.mkdir()
    (folder / "config.json").write_text(
        json.dumps({"quantization_config": ct.quantization_config(ignore=[])})
    )
    ct.put(folder, {"0.weight": w_q, "0.weight_scale": torch.ones(n, 1)})
    loaded = load_quantized(folder, model=model)[0]
    assert isinstance(loaded, W8A8Linear)
    return loaded


def test_weights_of_minus_128_do_not_overflow(tmp_path: Path) -> None:
    """|x_q| <= 127 here and |w_q| <= 128: 127 * 128 * MAX_K = 2,130,690,176 < 2^31, so the sums are exact."""
    assert 127 * 128 * reference.MAX_K < 2**31
    w_q = torch.full((3, reference.MAX_K), -128, dtype=torch.int8)
    layer = layer_of(w_q, tmp_path / "model")
    for sign in (-1.0, 1.0):
        x = torch.full((2, reference.MAX_K), 127.0) * sign
        expected = torch.tensor(-127 * 128 * reference.MAX_K * sign).float()
        results = [layer(x)]
        for level in cpu_native.levels_here() if cpu_native.cpu_status().available else ():
            with at_level(level):
                results.append(layer(x))
        with kernels_in_python():
            results.append(layer(x))
        for y in results:
            assert bool((y == expected).all())


# ------------------------------------------------------------------------------ what else works


def test_a_loaded_model_is_saved_in_the_own_format(tmp_path: Path) -> None:
    folder = ct.simple(tmp_path / "model", "static", model=ct.llama(tie_word_embeddings=True))
    model = load_quantized(folder)
    saved = save_quantized(model, tmp_path / "own")
    again = load_quantized(saved)
    assert_same_bits(logits(again), logits(model))
    assert ModelRecord.of(again) == ModelRecord.of(model)
    config = json.loads((saved / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "smoothquant_kernels" and len(config["modules"]) == 14


def test_a_model_can_be_passed(tmp_path: Path) -> None:
    folder = ct.simple(tmp_path / "model")
    model = ct.llama()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(7.0)
    assert load_quantized(folder, model=model) is model
    assert_same_bits(logits(model), logits(load_quantized(folder)))


def test_the_generation_configuration_is_read(tmp_path: Path) -> None:
    folder = ct.simple(tmp_path / "model")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 7]}))
    model: Any = load_quantized(folder)
    assert model.generation_config.eos_token_id == [5, 7]
    assert model.generate(IDS[:1, :4], max_new_tokens=3, do_sample=False).shape[1] <= 7


def test_inspect_describes_the_folder(tmp_path: Path) -> None:
    folder = ct.simple(tmp_path / "model", "static")
    found = Result("inspect", folder, "--json").json
    assert found["format"] == "compressed-tensors" and found["package_version"] == "0.19.0"
    assert found["quantized"] == 14 and found["config"]["activation_scheme"] == "static"
    stored = load_file(folder / ct.WEIGHTS)
    sizes = {n: t.nbytes for n, t in stored.items() if ".self_attn." in n or ".mlp." in n}
    assert found["bytes"]["quantized_layers"] == sum(sizes.values())
    assert "compressed-tensors 0.19.0" in Result("inspect", folder).out
    refused = Result("inspect", folder, "--verify")
    assert refused.code == 2 and "--verify compares digests" in refused.err


def test_which_configurations_are_w8a8() -> None:
    """transformers' own quantizer reads all others."""
    assert is_w8a8(ct.quantization_config())
    assert is_w8a8(ct.quantization_config(ct.group(["Linear"], {**ct.TOKEN, "symmetric": False})))
    others = [
        ct.group(["Linear"], None),
        ct.group(["Linear"], ct.TOKEN, {**ct.WEIGHT, "num_bits": 4}),
        ct.group(["Linear"], {**ct.TOKEN, "type": "float"}, {**ct.WEIGHT, "type": "float"}),
    ]
    for other in others:
        assert not is_w8a8(ct.quantization_config(other))
        assert not is_w8a8(ct.quantization_config(ct.group(["re:.*q_proj"]), other))
    sparse = {"format": "sparse-24-bitmask"}
    assert not is_w8a8({**ct.quantization_config(), "sparsity_config": sparse})
    assert not is_w8a8({"quant_method": "compressed-tensors"}) and not is_w8a8(None)
