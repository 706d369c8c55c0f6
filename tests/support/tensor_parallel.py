"""What the processes of tests/nn/test_tensor_parallel.py check.

    torchrun --nproc-per-node 2 -m tests.support.tensor_parallel FOLDER

Prints one line per check that held. Any other outcome ends the process with an error, and torchrun with it.
"""

from __future__ import annotations

import argparse
import copy
import io
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import parallelize_module
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig
from transformers.quantizers.base import HfQuantizer

from smoothquant_kernels import (
    ColwiseW8A8,
    RowwiseW8A8,
    SmoothQuantError,
    W8A8Linear,
    load_quantized,
    parallelize_model,
    register_transformers,
    save_quantized,
)
from smoothquant_kernels.checkpoint.tensor_parallel import finish
from smoothquant_kernels.schemes import ACTIVATION_SCHEMES, WEIGHT_GRANULARITIES
from tests.support import cases, models
from tests.support.checkpoints import IDS, assert_same_bits, llama, quantized
from tests.support.compare import assert_bitwise_equal

U = 2.0**-24
K, N = 48, 32


def mine(x: Tensor) -> Tensor:
    """This rank's part of the last dimension."""
    return x.chunk(dist.get_world_size(), -1)[dist.get_rank()]


def as_style(layer: nn.Module, style: ColwiseW8A8 | RowwiseW8A8) -> nn.Module:
    mesh = init_device_mesh(args.device, (dist.get_world_size(),))
    made = nn.Sequential(copy.deepcopy(layer))
    return parallelize_module(made, mesh, {"0": style})[0]


def layers(n: int = N) -> Iterator[tuple[str, W8A8Linear]]:
    for scheme in ACTIVATION_SCHEMES:
        for granularity in WEIGHT_GRANULARITIES:
            for bias, smooth, rotation in ((True, True, 0), (False, False, 16), (True, True, 16)):
                layer = cases.quantized(
                    cases.float_linear(K, n, bias),
                    scheme,
                    weight_granularity=granularity,
                    smooth=cases.inverse_smooth(K) if smooth else None,
                    rotation=rotation,
                )
                yield (
                    f"{scheme} {granularity} bias={bias} rotation={rotation}",
                    layer.to(args.device),
                )


def inputs() -> Iterator[Tensor]:
    for m in (0, 1, 17):
        for dtype in cases.FLOATS:
            yield cases.activations(m, K, dtype).to(args.device)
    x = cases.activations(6, K).view(2, 3, K).to(args.device)
    yield x
    x = x.clone()
    x[1, 1, K - 1] = torch.nan  # on the last rank only
    yield x


def layers_equal_one_process() -> None:
    """24 of 48 channels a rank are no multiple of 16: groups of the rotation lie on both ranks."""
    for what, layer in layers():
        column, row = as_style(layer, ColwiseW8A8()), as_style(layer, RowwiseW8A8())
        split = as_style(layer, RowwiseW8A8(split_input=True))
        for x in inputs():
            y = layer(x)
            assert_bitwise_equal(column(x), mine(y).contiguous(), what)
            assert_bitwise_equal(column(column.quantize_input(x)), mine(y).contiguous(), what)
            part = mine(x)
            assert_bitwise_equal(row(part), y, what)
            assert_bitwise_equal(row(row.quantize_input(part)), y, what)
            assert_bitwise_equal(split(x), y, what)
    for what, layer in layers(n=31):
        gathered, row = (
            as_style(layer, ColwiseW8A8(gather_output=True)),
            as_style(layer, RowwiseW8A8()),
        )
        assert {gathered.out_features, row.out_features} <= {15, 16}
        for x in inputs():
            y = layer(x)
            assert_bitwise_equal(gathered(x), y, what)
            assert_bitwise_equal(row(mine(x)), y, what)


def own_scales_add_up() -> None:
    """Float32 sums of two products: 3 roundings each (the sum to float32, two scales), and one of the total."""
    for what, layer in layers():
        if layer.rotation:
            continue
        for split_input in (False, True):
            row = as_style(layer, RowwiseW8A8(scales="own", split_input=split_input))
            assert row.in_features == K // 2
            for x in inputs():
                part = row.quantize_input(x if split_input else mine(x))
                term = part.x_q.reshape(-1, K // 2).double() @ row.w_q.double().T  # exact
                term = term * row.w_scale.double() * part.x_scale.double()[:, None]
                term = term.reshape(*x.shape[:-1], N)
                terms = [torch.empty_like(term) for _ in range(2)]
                dist.all_gather(terms, term)
                bias = 0.0 if layer.bias is None else layer.bias.double()
                exact = terms[0] + terms[1] + bias
                y = row(x if split_input else mine(x))
                assert y.dtype == x.dtype
                if x.dtype == torch.float32:
                    size = terms[0].abs() + terms[1].abs() + abs(bias)
                    assert bool(((y - exact).abs() <= 8 * U * size)[exact.isfinite()].all()), what
                    assert torch.equal(y.isfinite(), exact.isfinite())
                if layer.activation_scheme == "static" and x.dtype == torch.float32:
                    whole = layer(x)
                    assert bool(((y - whole).abs() <= 12 * U * size)[exact.isfinite()].all()), what


def gradients_equal_one_process() -> None:
    """dL/dx sums N products in float32, in another order: at most 2 N roundings of their magnitudes."""
    for what, layer in layers():
        x = cases.activations(5, K).to(args.device)
        grad = cases.activations(5, N, seed=3).to(args.device)
        expected = gradient(layer, x, grad)
        bound = 2 * N * U * (grad.abs() @ layer.dequantized_weight().abs())
        styles: list[tuple[ColwiseW8A8 | RowwiseW8A8, bool, bool]] = [
            (ColwiseW8A8(), False, True),
            (ColwiseW8A8(gather_output=True), False, False),
            (RowwiseW8A8(), True, False),
            (RowwiseW8A8(split_input=True), False, False),
        ]
        if not layer.rotation:
            styles += [
                (RowwiseW8A8(scales="own"), True, False),
                (RowwiseW8A8(scales="own", split_input=True), False, False),
            ]
        for style, part_of_x, part_of_y in styles:
            got = gradient(
                as_style(layer, style),
                mine(x) if part_of_x else x,
                mine(grad) if part_of_y else grad,
            )
            wrong = got - (mine(expected) if part_of_x else expected)
            assert bool((wrong.abs() <= (mine(bound) if part_of_x else bound)).all()), (what, style)


def gradient(layer: nn.Module, x: Tensor, grad: Tensor) -> Tensor:
    leaf = x.clone().requires_grad_()
    layer(leaf).backward(grad)
    assert leaf.grad is not None
    return leaf.grad


def tokens(model: nn.Module, **options: object) -> Tensor:
    ids = IDS[:, :8].to(args.device)
    made = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=6,
        do_sample=False,
        pad_token_id=0,
        **options,
    )
    assert isinstance(made, Tensor)
    return made


def logits(model: nn.Module) -> Tensor:
    return models.logits(model, IDS.to(args.device))


def some_models() -> Iterator[tuple[str, nn.Module, bool]]:
    """Each with whether int8 decides every bit of its hidden states: no float layer of it is sharded."""
    for scheme in ACTIVATION_SCHEMES:
        yield scheme, quantized(scheme=scheme), True
    yield "head", quantized(scheme="per_token", quantize_head=True), True  # 131 rows
    yield "tied", quantized(lambda: llama(tie_word_embeddings=True), "per_token"), True
    yield (
        "tied head",
        quantized(lambda: llama(tie_word_embeddings=True), "per_token", quantize_head=True),
        True,
    )
    yield "float gate, v", quantized(scheme="per_token", skip=("*.gate_proj", "*.v_proj")), False


def assert_near(got: Tensor, expected: Tensor) -> None:
    """Other bits of a float layer change some int8 values by 1 of 127, as little as the error of int8 itself."""
    assert float((got - expected).abs().max()) <= 0.02 * float(expected.abs().max())


def models_equal_one_process() -> None:
    for what, model, exact in some_models():
        model.to(args.device)
        expected, continued = logits(model), tokens(model)
        spread = parallelize_model(copy.deepcopy(model))
        down = spread.model.layers[0].mlp.down_proj
        assert down.w_q.numel() * 2 == model.model.layers[0].mlp.down_proj.w_q.numel()
        if not exact:
            assert_near(logits(spread), expected)
            continue
        for changed in (spread, copy.deepcopy(spread)):
            assert_same_bits(logits(changed), expected)
        assert torch.equal(tokens(spread), continued), what
        assert torch.equal(tokens(spread, cache_implementation="static"), continued), what


def own_scales_in_a_model() -> None:
    model = quantized(scheme="per_token", rotation="none").to(args.device)
    got, expected = logits(parallelize_model(copy.deepcopy(model), scales="own")), logits(model)
    assert not torch.equal(got, expected)
    assert_near(got, expected)


def from_pretrained_equals_one_process() -> None:
    """transformers shards a float head, whose sums of K products may have other bits: at most 2 K roundings."""
    if not hasattr(HfQuantizer, "update_attn_implementation"):
        return  # `register_transformers` refuses these releases
    register_transformers()
    for i, (what, model, exact) in enumerate(some_models()):
        folder = args.folder / str(i)
        if dist.get_rank() == 0:
            save_quantized(model, folder)
        dist.barrier()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # tp_plan is the earlier name
            new: dict[str, Any] = {"distributed_config": DistributedConfig(tp_size=2)}
            options = new if i % 2 else {"tp_plan": "auto"}
            loaded = AutoModelForCausalLM.from_pretrained(folder, **options)
        model.to(loaded.device)
        assert loaded.model.layers[0].mlp.down_proj.out_features == model.config.hidden_size // 2
        if not exact:
            assert_near(logits(loaded), logits(model))
            continue
        ids = IDS.to(loaded.device)
        hidden = model.model(ids).last_hidden_state
        assert_same_bits(loaded.model(ids).last_hidden_state, hidden)
        if "head" in what:
            assert_same_bits(logits(loaded), logits(model))
        else:
            size = hidden.abs() @ model.lm_head.weight.abs().T
            bound = 2 * hidden.shape[-1] * U * size
            assert bool(((logits(loaded) - logits(model)).abs() <= bound).all())
        assert torch.equal(tokens(loaded), tokens(model)), what
        assert torch.equal(tokens(loaded, cache_implementation="static"), tokens(model)), what
        spread = parallelize_model(load_quantized(folder, device=args.device, verify=False))
        assert_same_bits(logits(spread), logits(model))


def sharded_models_are_not_saved() -> None:
    model = parallelize_model(quantized(scheme="per_token").to(args.device))
    with pytest.raises(SmoothQuantError, match=r"q_proj is sharded over processes \(part \d of 2"):
        save_quantized(model, args.folder / "sharded")
    assert not (args.folder / "sharded").exists()
    with pytest.raises(SmoothQuantError, match="cannot be pickled"):
        torch.save(model, io.BytesIO())
    before = model.state_dict()
    with pytest.raises(SmoothQuantError, match=r"q_proj is sharded already \(part \d of 2"):
        parallelize_model(model)
    assert before.keys() == model.state_dict().keys()
    with pytest.raises(SmoothQuantError, match=r"reads \[\.\.\., 32\], got \(3, 16\)"):
        model.model.layers[0].self_attn.q_proj(torch.zeros(3, 16, device=args.device))


def compiled_models_have_no_breaks() -> None:
    model = quantized(scheme="per_token").to(args.device)
    ids, expected = IDS.to(args.device), logits(model)
    compiled = torch.compile(parallelize_model(model), backend="eager", fullgraph=True)
    assert_same_bits(compiled(ids).logits, expected)


def one_dimension_of_a_mesh() -> None:
    mesh = init_device_mesh(args.device, (1, 2), mesh_dim_names=("dp", "tp"))
    model = quantized(scheme="per_token").to(args.device)
    expected = logits(model)
    assert_same_bits(logits(parallelize_model(copy.deepcopy(model), mesh)), expected)
    assert_same_bits(logits(parallelize_model(copy.deepcopy(model), mesh["tp"])), expected)
    unnamed = init_device_mesh(args.device, (1, 2))
    with pytest.raises(SmoothQuantError, match='has 2 dimensions and none is named "tp"'):
        parallelize_model(model, unnamed)


def hooks_of_other_releases_are_refused() -> None:
    model = quantized(scheme="per_token").to(args.device)
    model._tp_size = 2
    model._device_mesh = init_device_mesh(args.device, (2,))
    model.model.layers[1].self_attn.o_proj.register_forward_hook(lambda *_: None)
    with pytest.raises(SmoothQuantError, match="int8 layers cannot follow the hooks of tp_plan"):
        finish(model, {})
    assert not any(getattr(m, "part", "") for m in model.modules())


CHECKS = (
    layers_equal_one_process,
    own_scales_add_up,
    gradients_equal_one_process,
    models_equal_one_process,
    own_scales_in_a_model,
    from_pretrained_equals_one_process,
    sharded_models_are_not_saved,
    compiled_models_have_no_breaks,
    one_dimension_of_a_mesh,
    hooks_of_other_releases_are_refused,
)

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--check", nargs="*", default=[check.__name__ for check in CHECKS])
    args = parser.parse_args()
    if args.device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if args.device == "cuda" else "gloo")
    for check in CHECKS:
        if check.__name__ in args.check:
            with torch.no_grad() if "gradient" not in check.__name__ else torch.enable_grad():
                check()
            print(f"rank {dist.get_rank()}: {check.__name__}", flush=True)
    dist.destroy_process_group()
