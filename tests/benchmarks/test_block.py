"""The whole-block benchmark: its blocks are transformers', what is wrong is not timed, its columns add up."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks import block as block_benchmark
from benchmarks.block import Case
from benchmarks.lib import blocks
from benchmarks.lib.blocks import Block, Parts, Shape, Situation
from benchmarks.lib.runner import WrongResult
from benchmarks.lib.timer import Timing
from smoothquant_kernels.fusion.record import fusion_info, fusion_spills

LLAMA, OPT = blocks.TOY_SHAPES
QWEN = Shape("toy qwen", 64, 96, 4, 1, head_dim=16, qkv_bias=True)
# float32 on both sides, a few hundred roundings of 2^-24 in other orders.
EQUAL = 1e-5


@pytest.fixture(autouse=True)
def no_grad() -> Any:
    with torch.no_grad():
        yield


def situation(shape: Shape, batch: int, tokens: int, start: int) -> tuple[Tensor, Situation]:
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(batch, tokens, shape.hidden, generator=generator)
    return x, Situation.make(shape, batch, tokens, start, x, generator)


def random_block(shape: Shape) -> Block:
    return Block(shape, "cpu").randomize(torch.Generator().manual_seed(1))


def copy_split(block: Block, targets: dict[str, list[nn.Module]]) -> None:
    """Merged matrices into transformers' separate ones."""
    for name, linears in targets.items():
        merged: Any = block.get_submodule(name)
        sizes = [linear.weight.shape[0] for linear in linears]
        for linear, weight in zip(linears, merged.weight.split(sizes), strict=True):
            linear.weight.copy_(weight)
        if merged.bias is not None:
            for linear, bias in zip(linears, merged.bias.split(sizes), strict=True):
                linear.bias.copy_(bias)


@pytest.mark.parametrize("shape", [LLAMA, QWEN], ids=lambda s: s.model)
def test_a_gated_block_is_the_one_of_transformers(shape: Shape) -> None:
    from transformers import LlamaConfig, Qwen2Config
    from transformers.models.llama import modeling_llama
    from transformers.models.qwen2 import modeling_qwen2

    facts: dict[str, Any] = {
        "hidden_size": shape.hidden, "intermediate_size": shape.mlp, "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads, "head_dim": shape.head_dim, "rms_norm_eps": blocks.EPS,
    }  # fmt: skip
    if shape.qkv_bias:
        config: Any = Qwen2Config(**facts)
        config._attn_implementation = "eager"
        layer: Any = modeling_qwen2.Qwen2DecoderLayer(config, 0)
        angles: Any = modeling_qwen2.Qwen2RotaryEmbedding(config)
    else:
        config = LlamaConfig(**facts)
        config._attn_implementation = "eager"
        layer = modeling_llama.LlamaDecoderLayer(config, 0)
        angles = modeling_llama.LlamaRotaryEmbedding(config)
    block = random_block(shape)
    a, mlp = layer.self_attn, layer.mlp
    copy_split(block, {
        "qkv": [a.q_proj, a.k_proj, a.v_proj], "o": [a.o_proj], "up": [mlp.gate_proj, mlp.up_proj],
        "down": [mlp.down_proj],
    })  # fmt: skip
    layer.input_layernorm.weight.copy_(block.norm1.weight)
    layer.post_attention_layernorm.weight.copy_(block.norm2.weight)
    x, at = situation(shape, 2, 9, 0)
    mask = torch.full((9, 9), float("-inf")).triu(1)[None, None]
    expected = layer(x, attention_mask=mask, position_embeddings=angles(x, torch.arange(9)[None]))
    torch.testing.assert_close(block(x, at), expected, rtol=EQUAL, atol=10 * EQUAL)


def test_an_opt_block_is_the_one_of_transformers() -> None:
    from transformers import OPTConfig
    from transformers.models.opt.modeling_opt import OPTDecoderLayer

    config = OPTConfig(
        hidden_size=OPT.hidden, ffn_dim=OPT.mlp, num_attention_heads=OPT.heads, dropout=0.0,
        attention_dropout=0.0, attn_implementation="eager",
    )  # fmt: skip
    layer: Any = OPTDecoderLayer(config, layer_idx=0).eval()
    block = random_block(OPT)
    a = layer.self_attn
    copy_split(block, {
        "qkv": [a.q_proj, a.k_proj, a.v_proj], "o": [a.out_proj], "up": [layer.fc1], "down": [layer.fc2],
    })  # fmt: skip
    for ours, theirs in (
        (block.norm1, layer.self_attn_layer_norm),
        (block.norm2, layer.final_layer_norm),
    ):
        theirs.load_state_dict(ours.state_dict())
    x, at = situation(OPT, 2, 9, 0)
    mask = torch.full((9, 9), float("-inf")).triu(1)[None, None].expand(2, 1, 9, 9)
    expected = layer(x, attention_mask=mask)
    expected = expected[0] if isinstance(expected, tuple) else expected
    torch.testing.assert_close(block(x, at), expected, rtol=EQUAL, atol=10 * EQUAL)


@pytest.mark.parametrize("shape", blocks.TOY_SHAPES, ids=lambda s: s.model)
def test_decoding_continues_a_prompt(shape: Shape) -> None:
    block = random_block(shape)
    x, prompt = situation(shape, 2, 7, 0)
    whole = block(x, prompt)
    _, last = situation(shape, 2, 1, 6)
    last.k[:, :, :6], last.v[:, :, :6] = prompt.k[:, :, :6], prompt.v[:, :, :6]
    for _ in range(2):  # again: the new key and value are written to the same place
        y = block(x[:, 6:], last)
        torch.testing.assert_close(y, whole[:, 6:], rtol=EQUAL, atol=10 * EQUAL)


@pytest.mark.parametrize("shape", [*blocks.TOY_SHAPES, QWEN], ids=lambda s: s.model)
@pytest.mark.parametrize("place", [(1, 24, 0), (3, 1, 5)], ids=["prefill", "decode"])
def test_fused_and_unfused_agree_and_smoothing_helps(
    shape: Shape, place: tuple[int, int, int]
) -> None:
    exact = random_block(shape)
    x, at = situation(shape, *place)
    sample, calibration = situation(shape, 1, 64, 0)
    before = copy.deepcopy(exact.state_dict())
    int8 = blocks.quantized(exact, sample, calibration)
    assert all(torch.equal(before[name], t) for name, t in exact.state_dict().items())
    y = exact(x, at.to(torch.float32))
    optimized = blocks.fused(int8, sample, calibration)
    unfused, fused = (f(x, at.to(torch.float32)) for f in (int8, optimized))
    assert not fusion_spills(optimized)
    assert not fusion_info(int8)  # what is compared with is still unfused
    # The fused norm rounds once, the unfused after every step: now and then an int8 differs by one, 1 % of its value.
    assert blocks.relative_error(fused, unfused, x) < 2e-3
    naive = copy.deepcopy(exact)
    for name in blocks.LINEARS:
        setattr(naive, name, blocks.W8A8Linear.from_linear(naive.get_submodule(name)))
    error = blocks.relative_error(fused, y, x)
    assert 1e-3 < error < 0.5 * blocks.relative_error(naive(x, at.to(torch.float32)), y, x)


def test_the_parts_are_the_whole() -> None:
    exact = random_block(LLAMA)
    x, at = situation(LLAMA, 1, 12, 0)
    fused = blocks.fused(blocks.quantized(exact, x, at), x, at)
    whole = fused(x, at)
    of = Parts(fused)
    parts = of.calls(x, at)
    assert set(parts) == set(block_benchmark.PARTS)
    gemms = parts["gemm"]()
    assert torch.equal(gemms[-1], whole)
    assert torch.equal(parts["attention"](), blocks.attend(LLAMA, gemms[0], at))
    quantized = parts["quantise"]()
    assert [tuple(q.shape) for q, *_ in quantized] == [(1, 12, 64)] * 3 + [(1, 12, 160)]
    for place, name in ((0, "qkv"), (2, "up")):
        assert torch.equal(of.multiply(name, quantized[place], x.dtype, None), gemms[place])


@pytest.mark.parametrize("name", ["norm1", "activation"])
def test_a_block_that_is_not_fused_is_not_timed(name: str) -> None:
    exact = random_block(LLAMA)
    x, at = situation(LLAMA, 1, 12, 0)
    int8 = blocks.quantized(exact, x, at)
    # A hook must see the float output, so that the module keeps its forward.
    int8.get_submodule(name).register_forward_hook(lambda *_: None)
    with pytest.raises(WrongResult, match=r"fused are .*'quantize'.*, not"):
        blocks.fused(int8, x, at)


CASE = Case(LLAMA, "prefill", 1, 8, 0)


@pytest.mark.parametrize("name", blocks.LINEARS)
def test_a_wrong_matrix_is_not_timed(name: str) -> None:
    sets, y = block_benchmark.make_sets(CASE, ("float32",), torch.device("cpu"))
    assert block_benchmark.errors(sets[0], y, ("float32",))["fused"] < block_benchmark.MOST_ERROR
    layer: Any = sets[0].variants["unfused"][0].get_submodule(name)
    layer.w_scale *= 1.5
    with pytest.raises(WrongResult, match=r"unfused: relative error .* at most 0\.09 is explained"):
        block_benchmark.errors(sets[0], y, ("float32",))
    layer.w_scale.fill_(float("nan"))
    with pytest.raises(WrongResult, match="relative error nan"):
        block_benchmark.errors(sets[0], y, ("float32",))


@pytest.mark.parametrize("shift", [0.0, 0.1])
def test_a_wrong_compiled_baseline_is_not_timed(shift: float) -> None:
    # What torch.compile would be asked for, without its minute.
    class Compiler(block_benchmark.Compiler):
        def __call__(self, function: Any) -> Any:
            return lambda *a: function(*a) * (1 + shift)

    row = block_benchmark.measure(CASE, torch.device("cpu"), 0.0, Compiler("default", 1.0))
    if shift:
        assert row["vs_float32_compiled"] is None
        assert row["float32_compiled_missing"].startswith("wrong: relative error")
    else:
        assert row["vs_float32_compiled"] > 0 and "float32_compiled_missing" not in row


@pytest.mark.parametrize("tokens", [1, 9])
def test_shared_keys_are_each_heads_own(tokens: int) -> None:
    generator = torch.Generator().manual_seed(2)
    q, k, v = (
        torch.randn(2, h, n, 16, generator=generator) for h, n in ((6, tokens), (2, 9), (2, 9))
    )
    scores = q @ k.repeat_interleave(3, 1).transpose(2, 3) / 4
    if tokens > 1:
        scores += torch.full((9, 9), float("-inf")).triu(1)
    expected = scores.softmax(-1) @ v.repeat_interleave(3, 1)
    torch.testing.assert_close(
        blocks.attention(q, k, v, tokens > 1), expected, rtol=EQUAL, atol=EQUAL
    )


def test_copies_share_nothing() -> None:
    sets, _ = block_benchmark.make_sets(CASE, ("float32", "bfloat16"), torch.device("cpu"))
    assert len(sets) == 2
    for name in ("float32", "bfloat16", "unfused"):
        places = []
        for one in sets:
            module, x, at = one.variants[name]
            tensors = [x, at.k, at.v, *module.parameters(), *module.buffers()]
            places.append({t.data_ptr() for t in tensors})
        assert not places[0] & places[1]


TIMES = {
    "fused": 100.0, "unfused": 130.0, "float16": 180.0, "bfloat16": 190.0, "gemm": 60.0, "quantise": 15.0,
    "attention": 20.0, "linears": 120.0,
}  # fmt: skip


def made_row() -> dict[str, Any]:
    timings = {name: Timing(us, us - 1, us + 1, 20, 2) for name, us in TIMES.items()}
    return block_benchmark.row_of(CASE, timings, ("float16", "bfloat16", "float16_compiled"), 0.02)


def test_columns_add_up() -> None:
    row = made_row()
    assert row["rest_us"] == 5.0 and row["float16_linears_us"] == 120.0
    assert (row["vs_float16"], row["vs_bfloat16"], row["vs_unfused"]) == (1.8, 1.9, 1.3)
    assert row["vs_float16_compiled"] is None
    # 2 x 8 tokens x (128 + 64 + 320) x 64 + 64 x 160 weights
    weights = (4 + 2 * 2) * 16 * 64 + 64 * 64 + 320 * 64 + 64 * 160
    assert row["tops"] == pytest.approx(2 * 8 * weights / 100.0 / 1e6)


def test_the_cpu_form(tmp_path: Path, capsys: Any, packs: list[int]) -> None:
    file = tmp_path / "block.json"
    command = ["--device", "cpu", "--quick", "--json", str(file), "--resume"]
    assert block_benchmark.run(block_benchmark.parse(command)) == 0
    rows = json.loads(file.read_text())["rows"]
    # Four weights of two blocks of two sets in four cases: not packed anew at every call.
    assert len(packs) <= 4 * 2 * 2 * 4
    assert [(r["model"], r["phase"]) for r in rows] == [
        (s.model, p) for s in blocks.TOY_SHAPES for p in ("prefill", "decode")
    ]
    for row in rows:
        assert row["us"] == pytest.approx(
            row["rest_us"] + sum(row[f"{p}_us"] for p in block_benchmark.PARTS)
        )
        assert row["vs_float32"] == pytest.approx(row["float32_us"] / row["us"])
        assert 0 < row["error"] <= block_benchmark.MOST_ERROR
    capsys.readouterr()
    assert block_benchmark.run(block_benchmark.parse(command)) == 0
    assert "4 cases were measured before, 0 are left" in capsys.readouterr().out
