"""The registry of layers against what is published of the models."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain

import pytest

from benchmarks.lib import cases
from benchmarks.lib.shapes import DECODERS, GEMM_TOKENS, LLM_LAYERS, Decoder, distinct


@dataclass(frozen=True)
class Published:
    """The parameters of a model as counted in its published weights, and what in them is no layer of a block."""

    total: int
    blocks: int
    vocabulary: int
    tables: int = 2  # of vocabulary x hidden: embeddings and lm_head, 1 where they are one
    positions: int = 0  # learned ones; OPT's are two more than its 2048


PUBLISHED = {
    "OPT-125M": Published(125_239_296, 12, 50272, 1, 2050),
    "OPT-1.3B": Published(1_315_758_080, 24, 50272, 1, 2050),
    "OPT-2.7B": Published(2_651_596_800, 32, 50272, 1, 2050),
    "OPT-6.7B": Published(6_658_473_984, 32, 50272, 1, 2050),
    "OPT-13B": Published(12_853_473_280, 40, 50272, 1, 2050),
    "OPT-30B": Published(29_974_540_288, 48, 50272, 1, 2050),
    "BLOOM-176B": Published(176_247_271_424, 70, 250880, 1),
    "LLaMA-7B": Published(6_738_415_616, 32, 32000),
    "LLaMA-13B": Published(13_015_864_320, 40, 32000),
    "LLaMA-30B": Published(32_528_943_616, 60, 32000),
    "LLaMA-65B": Published(65_285_660_672, 80, 32000),
    "LLaMA-70B": Published(68_976_648_192, 80, 32000),
    "Llama 3 8B": Published(8_030_261_248, 32, 128256),
    "Llama 3 70B": Published(70_553_706_496, 80, 128256),
    "Llama 3 405B": Published(405_853_388_800, 126, 128256),
    "Mistral 7B": Published(7_241_732_096, 32, 32000),
    "Mixtral 8x22B": Published(140_620_634_112, 56, 32000),
    "Mixtral 8x7B": Published(46_702_792_704, 32, 32000),
    "Qwen2.5-0.5B": Published(494_032_768, 24, 151936, 1),
    "Qwen2.5-1.5B": Published(1_543_714_304, 28, 151936, 1),
    "Qwen2.5-3B": Published(3_085_938_688, 36, 151936, 1),
    "Qwen2.5-7B": Published(7_615_616_512, 28, 152064),
    "Qwen2.5-14B": Published(14_770_033_664, 48, 152064),
    "Qwen2.5-32B": Published(32_763_876_352, 64, 152064),
    "Qwen2.5-72B": Published(72_706_203_648, 80, 152064),
    "Qwen3-8B": Published(8_190_735_360, 36, 151936),
    "Qwen3-14B": Published(14_768_307_200, 40, 151936),
    "Qwen3-32B": Published(32_762_123_264, 64, 151936),
}


def small_parameters(decoder: Decoder, blocks: int) -> int:
    """Norms, biases and routers, exactly: LayerNorms have two vectors, RMSNorms one."""
    h, family = decoder.hidden, decoder.model.split("-")[0].split()[0]
    # biases: q, k, v, o, fc2 of h, fc1 of 4 h; two norms; BLOOM's embedding has one too
    if family in ("OPT", "BLOOM"):
        return blocks * (5 * h + decoder.mlp + 4 * h) + (4 if family == "BLOOM" else 2) * h
    each = 2 * h
    if family == "Qwen2.5":  # biases of q, k and v
        each += decoder.q + 2 * decoder.kv
    if family == "Qwen3":  # norms of each head's q and k, 128 wide
        each += 2 * 128
    if decoder.experts > 1:
        each += decoder.experts * h
    return blocks * each + h


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_width_is_that_of_the_published_weights(name: str) -> None:
    """To the last parameter: a width that is one off changes the number by more than twice the hidden width."""
    known = PUBLISHED[name]
    (decoder,) = (d for d in DECODERS if d.model == name)
    outside = (known.tables * known.vocabulary + known.positions) * decoder.hidden
    linears = known.blocks * decoder.parameters
    assert linears + outside + small_parameters(decoder, known.blocks) == known.total


def test_the_parameters_are_those_of_the_layers() -> None:
    for decoder in DECODERS:
        sizes = {layer.name: layer.n * layer.k for layer in decoder.layers()}
        mlp = sizes["gate_up"] if decoder.gated else sizes["fc1"]
        mlp += sizes["down" if decoder.gated else "fc2"]
        attention = sizes["qkv"] + sizes["o" if decoder.gated else "out"]
        assert attention + decoder.experts * mlp == decoder.parameters


def test_models_whose_weights_are_not_counted_here_follow_their_family() -> None:
    rest = {d.model: d for d in DECODERS if d.model not in PUBLISHED}
    assert set(rest) == {"OPT-66B", "OPT-175B", "OPT-350M"}
    for decoder in rest.values():  # 12 h^2 in a block
        assert decoder.mlp == 4 * decoder.hidden and decoder.kv == decoder.q == decoder.hidden
    assert 64 * rest["OPT-66B"].parameters == pytest.approx(66e9, rel=0.02)
    assert 96 * rest["OPT-175B"].parameters == pytest.approx(175e9, rel=0.01)
    # 350M with embeddings
    assert 24 * rest["OPT-350M"].parameters == pytest.approx(302e6, rel=0.01)


def test_the_registry_of_layers() -> None:
    assert {layer.model for layer in LLM_LAYERS.values()} == {d.model for d in DECODERS}
    shapes = {name: (layer.n, layer.k) for name, layer in LLM_LAYERS.items()}
    assert shapes["LLaMA-7B up"] == (11008, 4096) and shapes["LLaMA-7B down"] == (4096, 11008)
    assert shapes["LLaMA-7B qkv"] == (3 * 4096, 4096) and "LLaMA-7B kv" not in shapes
    assert shapes["LLaMA-70B qkv"] == (8192 + 2 * 1024, 8192)
    assert shapes["LLaMA-70B kv"] == (1024, 8192)
    assert shapes["OPT-175B fc1"] == (49152, 12288) and shapes["OPT-175B fc2"] == (12288, 49152)
    assert shapes["Qwen2.5-7B gate_up"] == (2 * 18944, 3584)
    # Queries wider than the model: 64 heads of 128.
    assert shapes["Qwen3-32B o"] == (5120, 8192) and shapes["Qwen3-32B q"] == (8192, 5120)
    assert shapes["Qwen3-32B qkv"] == (8192 + 2 * 1024, 5120) and "Qwen3-8B q" not in shapes
    for decoder in DECODERS:  # heads of 64 or 128, and rows that every kernel can load
        assert decoder.q % 64 == decoder.kv % 64 == decoder.hidden % 64 == decoder.mlp % 16 == 0
        assert decoder.kv <= decoder.q and decoder.hidden < decoder.mlp


def test_shapes_that_models_share_are_measured_once_and_the_most_telling_first() -> None:
    layers = list(LLM_LAYERS.values())
    kept = distinct(layers)
    assert len({(layer.n, layer.k) for layer in kept}) == len(kept) < len(layers)
    assert sorted([*map(str, kept), *chain(*kept.values())]) == sorted(LLM_LAYERS)
    assert kept[LLM_LAYERS["LLaMA-7B o"]][:2] == ["Llama 3 8B o", "Mistral 7B o"]
    found = cases.cases_of(layers, GEMM_TOKENS)
    assert len({case.key for case in found}) == len(found) == len(kept) * len(GEMM_TOKENS)
    assert str(found[0]) == "LLaMA-7B up        M 2048 N 11008 K  4096"
    early = found[: len(found) // 4]
    assert {case.m for case in early} == set(GEMM_TOKENS) and len({c.layer for c in early}) > 12
    order = list(dict.fromkeys(case.layer.model for case in found))
    assert order[:4] == ["LLaMA-7B", "LLaMA-70B", "OPT-13B", "OPT-30B"]
    small = {d.model for d in DECODERS if d.hidden <= 2560}
    assert small <= set(order[-2 * len(small) :]) and not small & set(order[:20])
