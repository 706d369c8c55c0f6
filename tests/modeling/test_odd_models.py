"""Unusual models: hidden readers, subclasses of nn.Linear, and batches that reach only some layers."""

from __future__ import annotations

from collections import UserDict
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from smoothquant_kernels import (
    ActivationStatistics,
    SmoothQuantError,
    calibrate_model,
    quantize_model,
    search_config,
    smooth_lm,
)
from smoothquant_kernels.nn.linear import W8A8Linear
from tests.support.models import EXACT, layers_of, make_model, token_batches


def x(seed: int = 0) -> Tensor:
    return torch.randn(3, 16, generator=torch.Generator().manual_seed(seed))


class Heads(nn.Module):
    """The task decides which of two heads reads the norm."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inp = nn.Linear(16, 16)
        self.norm = nn.LayerNorm(16)
        self.heads = nn.ModuleList(nn.Linear(16, 8) for _ in range(2))

    def forward(self, x: Tensor, task: Tensor) -> Any:
        return self.heads[int(task)](self.norm(self.inp(x)))


def test_the_input_of_an_unreached_head_is_not_changed() -> None:
    model = Heads().eval()
    calls = [{"x": x(i), "task": torch.tensor(i)} for i in range(2)]
    before = [model(**c) for c in calls]
    smooth_lm(model, calls, config=EXACT, progress=False)
    assert all(torch.equal(model(**c), y) for c, y in zip(calls, before, strict=True))
    reason = layers_of(model)["heads.0"]["reason"]
    assert "heads.1, not called on the sample, may read norm too" in reason


@dataclass
class Aux:
    hidden: Tensor


@pytest.mark.parametrize(
    "container", [Aux, lambda h: UserDict(hidden=h), lambda h: [{"h": Aux(h)}]]
)
def test_returned_tensors_are_found_in_any_container(container: Any) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a, self.norm, self.out = nn.Linear(16, 16), nn.LayerNorm(16), nn.Linear(16, 4)

        def forward(self, x: Tensor) -> dict[str, Any]:
            self.h = self.norm(self.a(x))
            return {"logits": self.out(self.h), "aux": container(self.h)}

    model = Model().eval()
    model(x())
    before = model.h.clone()
    smooth_lm(model, [{"x": x()}], config=EXACT, progress=False)
    model(x())
    assert torch.equal(model.h, before)
    (out,) = [e for e in model.smoothquant_info["layers"] if e["name"] == "out"]
    assert out["smoothing"] == "runtime" and "the model returns it" in out["reason"]


class Scaled(nn.Linear):
    scale = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.scale


class Indexing(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.reshape(-1, x.shape[2]))


class Asserting(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        assert x.dim() == 3
        return super().forward(x)


def test_each_instance_of_a_linear_subclass_is_tested() -> None:
    model = nn.Sequential(Scaled(16, 16), Scaled(16, 16), Indexing(16, 16), Asserting(16, 16))
    model[1].scale = 3.0
    quantize_model(model)
    assert [isinstance(m, W8A8Linear) for m in model] == [True, False, False, False]
    assert [s["name"] for s in model.smoothquant_info["skipped"]] == ["1", "2", "3"]


def test_statistics_may_come_from_another_device_or_file(tmp_path: Any) -> None:
    """This shows the round trip through a file. A CPU cannot show the move to the weights' device."""
    model, other = make_model("llama"), make_model("llama")
    statistics = calibrate_model(model, token_batches(), progress=False)
    path = statistics.save(tmp_path / "s.safetensors")
    smooth_lm(model, statistics, config=EXACT, progress=False)
    smooth_lm(other, ActivationStatistics.load(path), config=EXACT, progress=False)
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True)
    )


class Experts(nn.Module):
    """Each batch reaches one of two experts."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(64, 16)
        self.a, self.out = nn.Linear(16, 16), nn.Linear(16, 64)
        self.experts = nn.ModuleList(nn.Linear(16, 16) for _ in range(2))

    def forward(self, input_ids: Tensor) -> Tensor:
        h = torch.relu(self.a(self.embed(input_ids)))
        return self.out(h + self.experts[int(input_ids[0, 0]) % 2](h))


def test_search_skips_batches_that_miss_an_expert() -> None:
    generator = torch.Generator().manual_seed(0)
    data = [torch.randint(0, 64, (1, 12), generator=generator) for _ in range(12)]
    for i, ids in enumerate(data):
        ids[0, 0] = i
    options: dict[str, Any] = {"tokens": 24, "validation_tokens": 24, "progress": False}
    whole = search_config(Experts(), data, **options)
    assert search_config(Experts(), data, max_bytes=1, **options).groups == whole.groups
    assert len(whole.groups) == 4


class Routed(nn.Module):
    """Experts that are modules, and a router that is a bare parameter. The router reads values that a probe changes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(64, 16)
        self.a, self.out = nn.Linear(16, 16), nn.Linear(16, 64)
        self.router = nn.Parameter(torch.randn(16, 4))
        self.experts = nn.ModuleList(nn.Linear(16, 16) for _ in range(4))

    def forward(self, input_ids: Tensor) -> Tensor:
        h = self.a(self.embed(input_ids))
        chosen = (h @ self.router).argmax(-1)
        mixed = torch.zeros_like(h)
        for i, expert in enumerate(self.experts):
            mixed[chosen == i] = expert(h[chosen == i])
        return self.out(h + mixed)


def test_a_probe_may_route_other_tokens_to_an_expert() -> None:
    generator = torch.Generator().manual_seed(0)
    data = [torch.randint(0, 64, (1, 24), generator=generator) for _ in range(2)]
    model = Routed().eval()
    with torch.no_grad():
        before = model(data[0])
        smooth_lm(model, data, config=EXACT, progress=False)
        assert torch.equal(model(data[0]), before)
    layers = layers_of(model)
    assert {layers[f"experts.{i}"]["smoothing"] for i in range(4)} == {"runtime"}


def test_search_does_not_score_padding() -> None:
    """Padding after the same tokens changes neither the costs nor the validation."""
    model = make_model("llama")
    generator = torch.Generator().manual_seed(1)
    short = [torch.randint(0, 131, (1, 10), generator=generator) for _ in range(12)]
    mask = torch.ones(1, 16, dtype=torch.long)
    mask[:, 10:] = 0
    padded = [
        {"input_ids": torch.nn.functional.pad(ids, (0, 6)), "attention_mask": mask} for ids in short
    ]
    plain = [{"input_ids": ids, "attention_mask": mask[:, :10]} for ids in short]
    options: dict[str, Any] = {"tokens": 20, "validation_tokens": 20, "progress": False}
    a = search_config(model, plain, **options)
    b = search_config(model, padded, **options)
    assert a.validation is not None and b.validation is not None
    assert (a.validation.tokens, b.validation.tokens) == (20, 20)
    # float32 sums over rows of another length add in another order.
    assert b.searched_cost == pytest.approx(a.searched_cost, rel=1e-3)
    assert b.validation.fixed_kl == pytest.approx(a.validation.fixed_kl, rel=0.02)


def test_batches_may_have_labels_and_square_masks() -> None:
    """Data sets for transformers have them. The mask is longer than the sample on which the groups are found."""
    ids = torch.randint(0, 131, (1, 48), generator=torch.Generator().manual_seed(2))
    square = torch.ones(1, 1, 48, 48, dtype=torch.bool).tril()
    for extra in ({"labels": ids}, {"attention_mask": square}):
        model, plain = make_model("llama"), make_model("llama")
        smooth_lm(model, [{"input_ids": ids, **extra}], config=EXACT, progress=False)
        smooth_lm(plain, [{"input_ids": ids}], config=EXACT, progress=False)
        changes = [
            (p - q).abs().max() for p, q in zip(model.parameters(), plain.parameters(), strict=True)
        ]
        assert max(changes) == 0


class Block(nn.Module):
    """A norm and two linears. The norm and the first linear can absorb factors."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.a, self.b = nn.LayerNorm(16), nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.b(self.a(self.norm(x)).relu())
        return y


@pytest.mark.parametrize("how", ["in place", "wrapped", "a layer"])
def test_a_compiled_model_is_handled_like_any_other(how: str) -> None:
    """The compiled graph is older than our hooks and would never call them."""
    model: Any = Block().eval()
    if how == "in place":
        model.compile(backend="eager")
    elif how == "wrapped":
        model = torch.compile(model, backend="eager")
    else:
        model.a = torch.compile(model.a, backend="eager")
    with torch.no_grad():  # as in calibration, so that no other graph is compiled
        before = model(x())
    smooth_lm(model, [{"x": x(i)} for i in range(2)], config=EXACT, progress=False)
    assert [e["smoothing"] for e in model.smoothquant_info["layers"]] == ["folded", "folded"]
    assert torch.equal(model(x()), before)
    quantize_model(model)
    assert sum(isinstance(m, W8A8Linear) for m in model.modules()) == 2
    change = (model(x()) - before).norm() / before.norm()
    assert 0 < change < 0.05  # 0 would mean that the old graph is still used


def test_a_bare_layer_is_refused() -> None:
    layer = nn.Linear(16, 16)
    for call in (quantize_model, lambda m: smooth_lm(m, [{"input": x()}], progress=False)):
        with pytest.raises(SmoothQuantError, match=r"itself a Linear.*nn.Sequential\(layer\)"):
            call(layer)
    assert type(quantize_model(nn.Sequential(layer))[0]) is W8A8Linear  # type: ignore[index]


def test_a_model_with_tensor_parallelism_is_refused() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        split: Any = parallelize_module(Block().eval(), mesh, {"a": ColwiseParallel()})
        for call in (quantize_model, lambda m: smooth_lm(m, [{"x": x()}], progress=False)):
            with pytest.raises(
                SmoothQuantError, match=r"a.weight is a DTensor, .*quantize the model first"
            ):
                call(split)
        assert type(split.a) is nn.Linear
    finally:
        dist.destroy_process_group()


def test_empty_layers_are_listed_as_skipped() -> None:
    model: Any = nn.Sequential(nn.Linear(16, 0), nn.Linear(0, 16), nn.Linear(16, 16))
    smooth_lm(model, [{"input": x()}], progress=False)
    quantize_model(model)
    reason = "it has no inputs or no outputs: stays in float"
    assert [(s["name"], s["reason"]) for s in model.smoothquant_info["skipped"]] == [
        ("0", reason),
        ("1", reason),
    ]


@pytest.mark.parametrize("hooked", ["norm", "a", "b"])
def test_hooks_see_unchanged_values(hooked: str) -> None:
    """A hook may use the values in any way, so they must not change, even if the model's output would not."""
    model: Any = Block().eval()
    seen: list[list[Tensor]] = []
    model.get_submodule(hooked).register_forward_hook(lambda m, args, y: seen.append([*args, y]))
    model(x())
    smooth_lm(model, [{"x": x(i)} for i in range(2)], config=EXACT, progress=False)
    model(x())
    assert all(map(torch.equal, seen[-1], seen[0]))
    folded = [e["name"] for e in model.smoothquant_info["layers"] if e["smoothing"] == "folded"]
    assert folded == {"norm": ["b"], "a": [], "b": ["a"]}[hooked]
