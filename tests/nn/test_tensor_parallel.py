"""Tensor parallelism: parts of layers in one process, plans and refusals, and real processes (gloo, NCCL)."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

from smoothquant_kernels import (
    ColwiseW8A8,
    RowwiseW8A8,
    SmoothQuantError,
    W8A8Linear,
    parallelize_model,
    reference,
)
from smoothquant_kernels.nn.parallel.model import check, resolve
from smoothquant_kernels.nn.parallel.shards import extent, shard_colwise, shard_rowwise
from smoothquant_kernels.schemes import ACTIVATION_SCHEMES, WEIGHT_GRANULARITIES
from tests.support import cases
from tests.support.checkpoints import llama, quantized
from tests.support.compare import assert_bitwise_equal
from tests.support.tensor_parallel import CHECKS

ROOT = Path(__file__).parents[2]


def layer(k: int = 48, n: int = 32, scheme: str = "per_token", **options: Any) -> W8A8Linear:
    return cases.quantized(cases.float_linear(k, n), scheme, **options)


# --- parts of one layer -----------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 5, 6, 7, 131])
@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_extents_cover_all_features_once(size: int, world: int) -> None:
    parts = [extent(size, rank, world) for rank in range(world)]
    covered = [i for first, count in parts for i in range(first, first + count)]
    assert covered == list(range(size))
    counts = [count for _, count in parts]
    assert counts == sorted(counts, reverse=True)
    assert max(counts) - min(counts) <= 1


@pytest.mark.parametrize("scheme", ACTIVATION_SCHEMES)
@pytest.mark.parametrize("granularity", WEIGHT_GRANULARITIES)
@pytest.mark.parametrize("world", [2, 3])
def test_column_parts_are_the_bits_of_the_layer(scheme: str, granularity: str, world: int) -> None:
    for n in (31, 48):
        for rotation in (0, 16):
            whole = layer(
                48,
                n,
                scheme,
                weight_granularity=granularity,
                smooth=cases.inverse_smooth(48),
                rotation=rotation,
            )
            before = copy.deepcopy(whole.state_dict())
            parts = [shard_colwise(whole, rank, world) for rank in range(world)]
            for m in (0, 1, 17):
                for dtype in cases.FLOATS:
                    x = cases.activations(m, 48, dtype)
                    got = torch.cat([part(x) for part in parts], -1)
                    assert_bitwise_equal(got, whole(x), f"{n} {rotation} {dtype}")
            assert sum(part.w_q.numel() for part in parts) == whole.w_q.numel()
            for name, t in whole.state_dict().items():
                assert torch.equal(t, before[name])
            assert not _shares_memory(parts[0], whole)


def _shares_memory(a: nn.Module, b: nn.Module) -> bool:
    def storages(m: nn.Module) -> set[int]:
        return {t.untyped_storage().data_ptr() for t in m.buffers()}

    return bool(storages(a) & storages(b))


@pytest.mark.parametrize("scheme", ACTIVATION_SCHEMES)
@pytest.mark.parametrize("granularity", WEIGHT_GRANULARITIES)
def test_row_parts_add_up_in_int32(scheme: str, granularity: str) -> None:
    """With one scale for all channels, which the static scheme has, the sums of the parts are those of the layer."""
    for k, world, rotation in ((48, 2, 8), (48, 3, 16), (31 * 3, 3, 0), (48, 2, 0)):
        whole = layer(
            k,
            17,
            scheme,
            weight_granularity=granularity,
            smooth=cases.inverse_smooth(k),
            rotation=rotation,
        )
        parts = [shard_rowwise(whole, rank, world) for rank in range(world)]
        assert [part.bias is not None for part in parts] == [True] + [False] * (world - 1)
        assert torch.equal(torch.cat([part.w_q for part in parts], 1), whole.w_q)
        assert not _shares_memory(parts[0], whole)
        for m in (0, 1, 17):
            x = cases.activations(m, k)
            one = whole.quantize_input(x)
            made = []
            for part, x_part in zip(parts, x.chunk(world, -1), strict=True):
                own = part.quantize_input(x_part)
                expected = reference.quantize(
                    x_part,
                    part.inv_smooth,
                    part.x_scale,
                    "tensor" if scheme == "per_tensor" else "token",
                    rotation=rotation,
                )
                assert_bitwise_equal(own.x_q, expected[0])
                assert_bitwise_equal(own.x_scale, expected[1])
                if scheme != "static":
                    assert bool((own.x_scale <= one.x_scale).all())
                made.append(own.x_q)
            if scheme == "static":
                assert_bitwise_equal(torch.cat(made, -1), one.x_q)
                total = sum(_sums(q, part.w_q) for q, part in zip(made, parts, strict=True))
                assert_bitwise_equal(total, _sums(one.x_q, whole.w_q))


def _sums(x_q: Tensor, w_q: Tensor) -> Tensor:
    return (x_q.double() @ w_q.double().T).to(torch.int32)


# --- refusals ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("style", "k", "n", "rotation", "world", "message"),
    [
        (
            ColwiseW8A8(),
            48,
            31,
            0,
            2,
            "x has 31 output features, which 2 ranks cannot share evenly",
        ),
        (ColwiseW8A8(gather_output=True), 48, 2, 0, 3, "x has 2 output features, which 3 ranks"),
        (RowwiseW8A8(), 31, 8, 0, 2, "x has 31 input features, which 2 ranks cannot share evenly"),
        (RowwiseW8A8(scales="own"), 31, 8, 0, 2, "x has 31 input features, which 2 ranks"),
        (RowwiseW8A8(), 48, 2, 0, 3, "x has 2 output features, which 3 ranks"),
        (
            RowwiseW8A8(scales="own"),
            48,
            8,
            16,
            2,
            "x rotates its 48 input features in groups of 16, and the 24 of each of 2 ranks would cut a group",
        ),
        (RowwiseW8A8(scales="mine"), 48, 8, 0, 2, "scales must be one of agreed, own; got 'mine'"),
    ],
    ids=str,
)
def test_layers_that_cannot_be_shared(
    style: Any, k: int, n: int, rotation: int, world: int, message: str
) -> None:
    with pytest.raises(SmoothQuantError, match=message):
        style.check(layer(k, n, rotation=rotation), world, "x")


def test_layers_that_can_be_shared() -> None:
    ColwiseW8A8(gather_output=True).check(layer(48, 31), 2)
    RowwiseW8A8().check(layer(48, 31, rotation=16), 2)
    RowwiseW8A8(split_input=True).check(layer(31, 31), 2)
    RowwiseW8A8(scales="own").check(layer(48, 31, rotation=8), 2)


def test_float_layers_and_other_classes_are_refused() -> None:
    class Own(W8A8Linear):
        pass

    for other in (nn.Linear(4, 4), Own(4, 4)):
        with pytest.raises(SmoothQuantError, match=r"x is a (Linear|Own) and this style is for a"):
            ColwiseW8A8().check(other, 2, "x")


def test_without_processes() -> None:
    with pytest.raises(SmoothQuantError, match="there is no process group"):
        parallelize_model(nn.Sequential(layer()), plan={"0": "colwise"})
    with pytest.raises(SmoothQuantError, match=r'plan must be "auto" or a mapping'):
        parallelize_model(nn.Sequential(layer()), plan="manual")


# --- plans ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model() -> Any:
    return quantized(scheme="per_token", skip=("*.v_proj", "*.0.mlp.down_proj"))


def test_the_plan_of_transformers(model: Any) -> None:
    found = resolve(model, model.tp_plan, "own")
    at = "model.layers.0.self_attn."
    assert found[at + "q_proj"] == ColwiseW8A8()
    assert found[at + "o_proj"] == RowwiseW8A8(scales="own")
    assert isinstance(found[at + "v_proj"], ColwiseParallel)
    assert isinstance(found["model.layers.0.mlp.down_proj"], RowwiseParallel)
    assert found["model.layers.1.mlp.down_proj"] == RowwiseW8A8(scales="own")
    assert len(found) == 14  # the embedding and the float head stay whole
    int8 = resolve(model, {**model.tp_plan, "model": "unknown"}, "own", float_layers=False)
    assert found.keys() - int8.keys() == {
        "model.layers.0.self_attn.v_proj",
        "model.layers.1.self_attn.v_proj",
        "model.layers.0.mlp.down_proj",
    }
    check(model, resolve(model, model.tp_plan, "agreed"), 2)


def test_styles_by_name() -> None:
    made = nn.Sequential(layer(), nn.Linear(4, 4), nn.LayerNorm(4))
    for name, expected in {
        "colwise": ColwiseW8A8(),
        "colwise_rep": ColwiseW8A8(gather_output=True),
        "colwise_gather_output": ColwiseW8A8(gather_output=True),
        "rowwise": RowwiseW8A8(),
        "rowwise_rep": RowwiseW8A8(split_input=True),
        "rowwise_split_input": RowwiseW8A8(split_input=True),
    }.items():
        assert resolve(made, {"0": name}, "agreed") == {"0": expected}
    for whole in ("replicated_with_grad_allreduce", "embedding_rowwise", "mla_kv_a_proj"):
        assert resolve(made, {"*": whole}, "agreed") == {}
    assert resolve(made, {"1": "colwise_rep", "[01]": "colwise", "00": "colwise"}, "agreed") == {}


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (
            {"0": "packed_colwise"},
            "style 'packed_colwise' for 0, a W8A8Linear, which it does not fit",
        ),
        ({"2": "colwise"}, "style 'colwise' for 2, a LayerNorm, which it does not fit"),
        ({"1": "colwise"}, "the plan names no quantized layer"),
        ({}, "the plan names no quantized layer"),
        ({"0": "colwise", "3": "rowwise"}, "3 and 0 are one layer, and the plan has rowwise and"),
        ({"0": "colwise", "1": "rowwise"}, "the float layer 1 has 5 input and 4 output features"),
    ],
    ids=str,
)
def test_plans_that_do_not_fit(plan: Mapping[str, str], message: str) -> None:
    shared = layer()
    made = nn.Sequential(shared, nn.Linear(5, 4), nn.LayerNorm(4), shared)
    with pytest.raises(SmoothQuantError, match=message):
        check(made, resolve(made, plan, "agreed"), 2)


def test_a_shared_layer_has_one_style() -> None:
    shared = layer()
    made = nn.Sequential(shared, shared)
    assert resolve(made, {"*": "colwise"}, "agreed") == {"0": ColwiseW8A8()}


def test_heads_are_not_cut() -> None:
    one_kv_head = quantized(lambda: llama(num_key_value_heads=1), "per_token")
    styles = resolve(one_kv_head, one_kv_head.tp_plan, "agreed")
    with pytest.raises(
        SmoothQuantError, match=r"k_proj makes 1 heads of 8 features, which 2 ranks"
    ):
        check(one_kv_head, styles, 2)


# --- real processes ---------------------------------------------------------------------------------


def ranks(folder: Path, *options: str) -> str:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    command += ["-m", "tests.support.tensor_parallel", str(folder), *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    yield ranks(tmp_path_factory.mktemp("ranks"))


@pytest.mark.slow
@pytest.mark.parametrize("name", [check.__name__ for check in CHECKS])
def test_two_processes(on_cpu: str, name: str) -> None:
    for rank in range(2):
        assert f"rank {rank}: {name}" in on_cpu, on_cpu


@pytest.mark.cuda
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus(tmp_path: Path) -> None:
    output = ranks(tmp_path, "--device", "cuda")
    for name in (function.__name__ for function in CHECKS):
        for rank in range(2):
            assert f"rank {rank}: {name}" in output, output
