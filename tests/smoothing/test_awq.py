"""The search of factors for W4A8 layers: its errors are those of the layers, and it never increases them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from smoothquant_kernels import (
    SmoothQuantConfig,
    W4A8Linear,
    W8A8Linear,
    calibrate_model,
    quantize_model,
    smooth_lm,
)
from smoothquant_kernels.modeling.groups import Group
from smoothquant_kernels.modeling.record import LayerRecord, ModelRecord
from smoothquant_kernels.modeling.run import Batch, evaluating
from smoothquant_kernels.nn.float_linear import pending_smooth
from smoothquant_kernels.nn.rounding_w4 import int4_weight
from smoothquant_kernels.reference import w4_weight
from smoothquant_kernels.schemes import ACTIVATION_SCHEMES
from smoothquant_kernels.search import candidates
from smoothquant_kernels.search.sensitivity import record
from smoothquant_kernels.smoothing import int8_error
from smoothquant_kernels.smoothing.factors import AWQ_ALPHAS, AWQ_NORMS, Plan, group_factors
from smoothquant_kernels.smoothing.int8_error import InputSettings, output_errors
from tests.support.models import layers_of, make_model, token_batches

DATA = token_batches(3, length=24)
CONFIG = SmoothQuantConfig(w_bit=4)

pytestmark = pytest.mark.filterwarnings("ignore:the calibration data ended")


def as_in_layers(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`rounded_w4` by the longer search that the layers' weights come from."""
    made = int4_weight(w, None, 0)
    return w4_weight(made.w_q4, made.w_group, w.shape[1]).float(), made.w_scale


@pytest.mark.parametrize("rotation", [0, 16])
@pytest.mark.parametrize("scheme", ACTIVATION_SCHEMES)
def test_errors_equal_those_of_the_real_layers(
    scheme: str, rotation: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(int8_error, "rounded_w4", as_in_layers)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(144, 20, bias=False)).eval()
    x = torch.randn(30, 144) * torch.linspace(0.1, 4.0, 144)
    settings = InputSettings(scheme, 0.05, rotation, "w4a8")
    factors = [None, x.abs().amax(0), x.abs().amax(0).sqrt()]
    with evaluating(model):
        found = output_errors(
            model, {Group(("0",)): factors}, lambda *_: settings, {}, lambda _: model(x), "channel"
        )
    exact = F.linear(x.double(), model[0].weight.detach().double())
    for error, smooth in zip(found[Group(("0",))], factors, strict=True):
        layer = W4A8Linear.from_linear(
            model[0],
            activation_scheme=scheme,
            smooth=smooth,
            rotation=rotation,
            x_scale=0.05 if scheme == "static" else None,
        )
        expected = float((layer(x).double() - exact).norm() / exact.norm())
        # Both sides round float32 sums of 144 products, which changes an error of 1e-2 by far less than 1e-4 of it.
        assert error == pytest.approx(expected, rel=1e-4)


class Spy:
    """Records what the search of a smoothing run gave every group, with both errors on the sample."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.errors: dict[Group, list[float]] = {}
        self.changed: set[str] = set()
        search = Plan.search_for_w4

        def watched(plan: Any, batch: Batch, run_sample: Callable[[Batch], Any]) -> None:
            before = dict(plan._factors)
            search(plan, batch, run_sample)
            both = {g: (before[g], s) for g, s in plan._factors.items()}
            self.errors = output_errors(
                plan._model, both, plan._trial_of, batch, run_sample, "channel"
            )
            for group, (old, new) in both.items():
                if not torch.equal(old, new):
                    self.changed |= set(group.linears)

        monkeypatch.setattr(Plan, "search_for_w4", watched)


@pytest.mark.parametrize(
    "setting", [{}, {"rotation": "none"}, {"activation_scheme": "static"}], ids=str
)
def test_the_search_never_increases_the_error(
    setting: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    spy = Spy(monkeypatch)
    smooth_lm(make_model("llama_gqa"), DATA, config=CONFIG.replace(**setting), progress=False)
    assert len(spy.errors) == 8 and spy.changed
    assert all(new <= old * (1 + 1e-6) for old, new in spy.errors.values())
    smaller = [new < 0.99 * old for old, new in spy.errors.values()]
    assert any(smaller)


def test_only_the_groups_in_question_change(monkeypatch: pytest.MonkeyPatch) -> None:
    spy = Spy(monkeypatch)
    data, plain = (
        calibrate_model(make_model("llama_gqa"), DATA, progress=False),
        SmoothQuantConfig(),
    )
    for config in (plain, CONFIG.replace(awq=False), CONFIG.replace(alphas={"*": 0.5})):
        model = smooth_lm(make_model("llama_gqa"), data, config=config)
        assert not spy.changed
        assert {la["alpha"] for la in layers_of(model).values()} == {0.5}
    one = plain.replace(formats={"*.layers.0.mlp.down_proj": "w4a8", "*.k_proj": "w4a8"})
    model = smooth_lm(make_model("llama_gqa"), data, config=one)
    layers = [f"model.layers.{i}.self_attn.{n}_proj" for i in (0, 1) for n in "qkv"]
    assert spy.changed and spy.changed <= {*layers, "model.layers.0.mlp.down_proj"}


@pytest.mark.parametrize("rotation", [None, "none"])
def test_the_record_has_what_made_the_factors(rotation: str | None) -> None:
    config = CONFIG.replace(folding="never", only_where_better=False)
    if rotation is not None:
        config = config.replace(rotation=rotation)
    model: Any = make_model("llama_gqa")
    original = copy.deepcopy(model)
    statistics = calibrate_model(model, DATA, progress=False)
    smooth_lm(model, statistics, config=config)
    layers, alphas, norms = layers_of(model), set(), set()
    for name, layer in layers.items():
        alphas.add(layer["alpha"])
        factors = group_factors(
            original,
            Group(tuple(layer["group"])),
            statistics,
            layer["alpha"],
            layer.get("norms") or config.norms_of("per_token", rotated=rotation is None),
            config,
        )
        norms.add(tuple(layer.get("norms") or ()))
        pending = pending_smooth(model.get_submodule(name))
        assert pending is not None and torch.equal(pending, factors)
    assert len(alphas) > 1 and alphas <= {*AWQ_ALPHAS, 0.5}
    assert norms == {()} if rotation is None else AWQ_NORMS in norms
    records = ModelRecord.of(model).layers
    assert [LayerRecord.from_dict(record.to_dict()) for record in records] == list(records)
    made = quantize_model(model)
    assert all(isinstance(made.get_submodule(name), W4A8Linear) for name in layers)


def test_a_model_whose_weights_need_it_gains() -> None:
    """Large input channels meet small weights, which 4 bits would lose: the usual factors cure that, and the best more.

    Without any, the error is several times as large.
    """

    class One(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.hot = torch.logspace(0, 2, 128)[torch.randperm(128)]
            self.linear = nn.Linear(128, 64, bias=False)
            with torch.no_grad():
                self.linear.weight /= self.hot.sqrt()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(x * self.hot)

    g = torch.Generator().manual_seed(1)
    data = [{"x": torch.randn(1, 64, 128, generator=g)} for _ in range(3)]
    fresh = torch.randn(200, 128, generator=g)
    errors = {}
    for name, setting in (("awq", {}), ("plain", {"awq": False}), ("naive", {"smooth": False})):
        model = One().eval()
        with torch.no_grad():
            exact = model(fresh)
            config = CONFIG.replace(rotation="none", **setting)
            smooth_lm(model, data, config=config, progress=False)
            errors[name] = float((quantize_model(model)(fresh) - exact).norm() / exact.norm())
    assert errors["awq"] <= 1.01 * errors["plain"]
    assert errors["awq"] < 0.5 * errors["naive"]


def test_candidates_of_search_config_cost_what_the_layers_will(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(candidates, "rounded_w4", as_in_layers)
    model: Any = make_model("llama_gqa")
    config = SmoothQuantConfig(formats={"*.k_proj": "w4a8"})
    statistics = calibrate_model(model, DATA, progress=False)
    group = Group(tuple(f"model.layers.1.self_attn.{n}_proj" for n in "qk"))
    recording = record(model, [group], [{"input_ids": batch} for batch in DATA])
    found = candidates.Space(model, statistics, config).explore(group, ["per_token"], recording)
    x = recording.x[group.linears[0]]
    for choice in found.tried[:3]:
        assert choice.alpha is not None
        norms = config.norms_of("per_token", rotated=choice.rotation > 0)
        s = group_factors(model, group, statistics, choice.alpha, norms, config)
        cost = 0.0
        for name, kind in zip(group.linears, (W8A8Linear, W4A8Linear), strict=True):
            linear = model.get_submodule(name)
            layer = kind.from_linear(linear, smooth=s, rotation=choice.rotation)
            with torch.no_grad():
                cost += recording.cost(name, layer(x) - linear(x))
        assert choice.cost == pytest.approx(cost, rel=1e-4)  # float32 sums in another order
