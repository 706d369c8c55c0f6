"""Layers of vLLM models with our method, each against `W8A8Linear`, bit for bit: integers and one order of floats."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("vllm")

from vllm.model_executor.layers.linear import (
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

from smoothquant_kernels import SmoothQuantError, W8A8Linear
from smoothquant_kernels.checkpoint.vllm.method import Config
from smoothquant_kernels.nn.kinds import describe
from smoothquant_kernels.schemes import ACTIVATION_SCHEMES, WEIGHT_GRANULARITIES

K, HEAD, QKV = 64, 16, {"q_proj": 64, "k_proj": 32, "v_proj": 32}
PACKED = {"qkv_proj": list(QKV), "gate_up_proj": ["gate_proj", "up_proj"]}
Rank = Callable[[int, int], None]


def layer_of(
    n: int, k: int = K, *, seed: int = 0, bias: bool = False, smooth: float = 1.0, **settings: Any
) -> W8A8Linear:
    """A random layer. `smooth` multiplies the factors, which are those of one input; 0 is none."""
    generator = torch.Generator().manual_seed(seed)
    linear = nn.Linear(k, n, bias)
    for parameter in linear.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    factors = torch.rand(k, generator=torch.Generator().manual_seed(9)) + 0.5
    scale = 0.02 if settings.get("activation_scheme") == "static" else None
    return W8A8Linear.from_linear(
        linear, **{"smooth": factors * smooth if smooth else None, "x_scale": scale, **settings}
    )


def config_of(parts: dict[str, W8A8Linear]) -> Config:
    config = Config({"modules": {name: describe(part) for name, part in parts.items()}})
    config.packed_modules_mapping = PACKED
    return config


def load(layer: Any, parts: dict[str, W8A8Linear], shards: list[Any], leave: str = "") -> Any:
    """Gives vLLM's layer the tensors of the checkpoint, as vLLM's models do."""
    own = dict(layer.named_parameters())
    for (name, part), shard in zip(parts.items(), shards, strict=True):
        for key, value in part._buffers.items():
            if value is not None and f"{name}.{key}" != leave:
                own[key].weight_loader(own[key], value, *(() if shard is None else (shard,)))
    layer.quant_method.process_weights_after_loading(layer)
    return layer


def qkv(parts: dict[str, W8A8Linear], leave: str = "", bias: bool = False) -> Any:
    layer = QKVParallelLinear(
        K, HEAD, 4, 2, bias, prefix="a.qkv_proj", quant_config=config_of(parts), return_bias=False
    )
    return load(layer, parts, ["q", "k", "v"], leave)


def qkv_parts(**settings: Any) -> dict[str, W8A8Linear]:
    return {f"a.{name}": layer_of(n, seed=i, **settings) for i, (name, n) in enumerate(QKV.items())}


def inputs(dtype: torch.dtype = torch.float32, k: int = K) -> Tensor:
    return torch.randn(7, k, generator=torch.Generator().manual_seed(4)).to(dtype)


def together(parts: dict[str, W8A8Linear], x: Tensor) -> Tensor:
    return torch.cat([part(x) for part in parts.values()], -1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rotation", [0, 16])
@pytest.mark.parametrize("granularity", WEIGHT_GRANULARITIES)
@pytest.mark.parametrize("scheme", ACTIVATION_SCHEMES)
@pytest.mark.filterwarnings("ignore:a.qkv_proj has one dynamic scale")
def test_merged_layer(
    rank: Rank, scheme: str, granularity: str, rotation: int, dtype: torch.dtype
) -> None:
    parts = qkv_parts(activation_scheme=scheme, weight_granularity=granularity, rotation=rotation)
    layer, x = qkv(parts), inputs(dtype)
    assert len(layer.quant_method._calls) == 1
    assert torch.equal(layer(x), together(parts, x))


@pytest.mark.parametrize("smooth", [0.0, 1.0])
def test_bias_and_factors(rank: Rank, smooth: float) -> None:
    parts = qkv_parts(bias=True, smooth=smooth)
    layer = qkv(parts, bias=True)
    assert (layer.inv_smooth is not None) == bool(smooth)
    assert torch.equal(layer(inputs()), together(parts, inputs()))


@pytest.mark.parametrize(
    "other",
    [
        {"activation_scheme": "per_token", "x_scale": None},
        {"x_scale": 0.03},
        {"rotation": 8},
        {"smooth": 2.0},
        {"smooth": 0.0},
    ],
    ids=["scheme", "scale", "rotation", "factors", "no factors"],
)
def test_parts_that_differ_are_calls_of_their_own(rank: Rank, other: dict[str, Any]) -> None:
    parts = qkv_parts(activation_scheme="static", bias=True)
    settings = {"activation_scheme": "static", "bias": True, **other}
    parts["a.k_proj"] = layer_of(32, seed=1, **settings)
    layer = qkv(parts, bias=True)
    assert len(layer.quant_method._calls) == 3
    assert torch.equal(layer(inputs()), together(parts, inputs()))


@pytest.mark.parametrize("ranks", [2, 4])  # 4: more than the key heads, which are then copied
def test_columns_of_each_rank(rank: Rank, ranks: int) -> None:
    parts = qkv_parts(bias=True, rotation=16)
    whole = [part(inputs()) for part in parts.values()]
    for index in range(ranks):
        rank(index, ranks)
        got = qkv(parts, bias=True)(inputs())
        own = [whole[0].chunk(ranks, -1)[index]]
        own += [y.chunk(min(ranks, 2), -1)[index * min(ranks, 2) // ranks] for y in whole[1:]]
        assert torch.equal(got, torch.cat(own, -1))


def test_gate_and_up_of_each_rank(rank: Rank) -> None:
    parts = {"m.gate_proj": layer_of(48), "m.up_proj": layer_of(48, seed=1)}
    whole = [part(inputs()).chunk(2, -1) for part in parts.values()]
    for index in range(2):
        rank(index, 2)
        layer = MergedColumnParallelLinear(
            K,
            [48, 48],
            bias=False,
            prefix="m.gate_up_proj",
            quant_config=config_of(parts),
            return_bias=False,
        )
        got = load(layer, parts, [0, 1])(inputs())
        assert torch.equal(got, torch.cat([y[index] for y in whole], -1))


def rows(part: W8A8Linear) -> Any:
    layer = RowParallelLinear(
        part.in_features,
        part.out_features,
        bias=part.bias is not None,
        prefix="a.o_proj",
        quant_config=config_of({"a.o_proj": part}),
        return_bias=False,
    )
    return load(layer, {"a.o_proj": part}, [None])


@pytest.mark.parametrize("scheme", ["per_token", "static"])
def test_rows_of_each_rank(rank: Rank, scheme: str) -> None:
    whole = layer_of(48, bias=True, rotation=16, activation_scheme=scheme)
    for index in range(2):
        rank(index, 2)
        part = W8A8Linear(
            32, 48, index == 0, activation_scheme=scheme, smooth=True, rotation=16
        )  # bias: once
        cut = slice(32 * index, 32 * index + 32)
        part.w_q, part.w_scale, part.x_scale = whole.w_q[:, cut], whole.w_scale, whole.x_scale
        assert whole.inv_smooth is not None
        part.inv_smooth = whole.inv_smooth[cut]
        part.bias = whole.bias if index == 0 else None
        assert torch.equal(rows(whole)(inputs(k=32)), part(inputs(k=32)))


@pytest.mark.parametrize("ranks", [1, 2])
def test_output_head(rank: Rank, ranks: int) -> None:
    part, got = layer_of(100), []
    for index in range(ranks):
        rank(index, ranks)
        head = ParallelLMHead(100, K, prefix="lm_head", quant_config=config_of({"lm_head": part}))
        load(head, {"lm_head": part}, [None])
        assert head.tie_weights(nn.Embedding(100, K)) is head
        got.append(head.quant_method.apply(head, inputs()))
    logits = torch.cat(got, -1)
    assert torch.equal(logits[:, :100], part(inputs()))
    assert logits.shape[1] == 128 and not logits[:, 100:].any()  # vLLM's padding


class TestRefusals:
    def test_rotation_across_ranks(self, rank: Rank) -> None:
        rank(1, 2)
        message = r"a\.o_proj rotates groups of 64 channels, .* each process 32 of its 64, .*\{'a.o_proj': 32\}"
        with pytest.raises(SmoothQuantError, match=message):
            rows(layer_of(48, rotation=64))

    def test_a_part_in_float(self, rank: Rank) -> None:
        parts = qkv_parts()
        del parts["a.v_proj"]
        with pytest.raises(SmoothQuantError, match=r"merges .* and a\.v_proj is in float"):
            qkv(parts)

    @pytest.mark.parametrize("tensor", ["w_q", "w_scale", "inv_smooth", "x_scale"])
    def test_a_missing_tensor(self, rank: Rank, tensor: str) -> None:
        with pytest.raises(SmoothQuantError, match=rf"loaded no a\.k_proj\.{tensor}: copy"):
            qkv(qkv_parts(activation_scheme="static"), leave=f"a.k_proj.{tensor}")

    @pytest.mark.parametrize("value", [float("nan"), -1.0])
    def test_a_bad_scale(self, rank: Rank, value: float) -> None:
        parts = qkv_parts()
        parts["a.v_proj"].w_scale[3] = value
        with pytest.raises(SmoothQuantError, match=r"a\.v_proj\.w_scale has a value that is NaN"):
            qkv(parts)

    def test_a_bias_that_the_model_lacks(self, rank: Rank) -> None:
        parts = qkv_parts(bias=True)
        layer = QKVParallelLinear(
            K, HEAD, 4, 2, bias=False, prefix="a.qkv_proj", quant_config=config_of(parts)
        )
        own = dict(layer.named_parameters())
        for part, shard in zip(parts.values(), "qkv", strict=True):
            for key in ("w_q", "w_scale", "inv_smooth"):
                own[key].weight_loader(own[key], getattr(part, key), shard)
        with pytest.raises(SmoothQuantError, match=r"a\.q_proj has a bias in the checkpoint and"):
            layer.quant_method.process_weights_after_loading(layer)

    def test_experts(self) -> None:
        class FusedMoE(nn.Module):
            """Has the name of vLLM's layer."""

        config = config_of({"m.experts.0.up_proj": layer_of(8)})
        with pytest.raises(SmoothQuantError, match=r"m\.experts\.0\.up_proj is int8: .*m\.experts"):
            config.get_quant_method(FusedMoE(), "m.experts")
        assert config.get_quant_method(FusedMoE(), "other.experts") is None

    def test_no_modules(self) -> None:
        with pytest.raises(SmoothQuantError, match="save the checkpoint again"):
            Config({}).get_quant_method(nn.Module(), "a")
