"""The search: its costs, its candidates, its decisions, and the same result after an interruption."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from smoothquant_kernels import (
    SearchResult,
    SmoothQuantConfig,
    SmoothQuantError,
    W8A8Linear,
    calibrate_model,
    search_config,
    smooth_and_quantize,
)
from smoothquant_kernels.modeling.groups import Group
from smoothquant_kernels.modeling.run import evaluating, run
from smoothquant_kernels.search import search as search_module
from smoothquant_kernels.search.candidates import ALPHAS, Space
from smoothquant_kernels.search.result import Choice, GroupResult, Validation
from smoothquant_kernels.search.sensitivity import divergence, record
from smoothquant_kernels.smoothing.factors import group_factors
from tests.support.models import layers_of, make_model, token_batches

DATA = token_batches(8)
STATIC = SmoothQuantConfig(activation_scheme="static")


def searched(model: nn.Module, config: SmoothQuantConfig = STATIC, **options: Any) -> SearchResult:
    options = {"tokens": 96, "validation_tokens": 96, "progress": False, **options}
    return search_config(model, options.pop("data", DATA), config, **options)


# --- costs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["model.layers.0.mlp.down_proj", "model.layers.1.self_attn.v_proj"]
)
def test_cost_is_the_divergence_that_an_error_causes(name: str) -> None:
    """Compares the cost of small independent errors in one layer with the KL divergence measured at the output."""
    model = make_model("llama")
    batches = [{"input_ids": b} for b in token_batches(24)]
    recording = record(model, [Group((name,))], batches)
    gradient = recording.gradient[name]
    weight = model.get_submodule(name).weight.detach()
    rms = (recording.x[name] @ weight.T).square().mean().sqrt()
    generator = torch.Generator().manual_seed(3)
    error = 0.03 * rms * torch.randn(gradient.shape, generator=generator)
    parts = iter(error.split(recording.rows[name]))
    measured = []
    with evaluating(model):
        expected = [run(model, b) for b in batches]
        hook = lambda _, __, y: y + next(parts).reshape(y.shape)  # noqa: E731
        handle = model.get_submodule(name).register_forward_hook(hook)
        for batch, before in zip(batches, expected, strict=True):
            measured.append(divergence(before, run(model, batch)))
        handle.remove()
    kl = torch.cat(measured)
    assert len(kl) == recording.predictions == 24 * 2 * 24
    # Both are means over 1,152 tokens of terms like a squared normal variable, with a measured relative scatter of
    # about 1.5. So one standard error of their ratio is about 6 %, and the second-order formula adds some percent.
    assert recording.cost(name, error) == pytest.approx(float(kl.mean()), rel=0.25)
    # A third of the error costs a ninth.
    assert recording.cost(name, error / 3) == pytest.approx(recording.cost(name, error) / 9)


def test_cost_without_labels_is_half_the_relative_squared_error() -> None:
    """An encoder's output is taken as the mean of a normal distribution whose width is the output's magnitude."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8))
    batches = [{"input": torch.randn(64, 6)} for _ in range(40)]
    recording = record(model, [Group(("0",))], batches)
    error = torch.randn(2560, 8)
    y = torch.cat([model(b["input"]) for b in batches]).detach()
    per_batch = y.reshape(40, -1).square().mean(1).repeat_interleave(64)[:, None] * 8
    exact = 0.5 * (error.square() / per_batch).sum() / 2560
    # The mean of 20,480 squared normal variables with a relative scatter of sqrt(2) has a standard error of 1 %.
    assert recording.cost("0", error) == pytest.approx(float(exact), rel=0.04)
    rows = divergence(y, y + error)
    half = 0.5 * error.square().sum(1) / y.square().sum(1).mean()
    torch.testing.assert_close(rows.float(), half)


def test_padding_costs_nothing() -> None:
    model = make_model("llama")
    ids = token_batches(1)[0]
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    name = "model.layers.0.mlp.down_proj"
    recording = record(model, [Group((name,))], [{"input_ids": ids, "attention_mask": mask}])
    assert recording.rows[name] == [24 + 5] and len(recording.gradient[name]) == 24 + 5
    assert recording.x[name].shape == (29, 88)


def test_recording_does_not_change_the_model() -> None:
    model = make_model("opt").train()
    model.model.decoder.layers[0].fc1.weight.requires_grad_(False)
    flags = [p.requires_grad for p in model.parameters()]
    before = copy.deepcopy(model.state_dict())
    searched(model)
    assert [p.requires_grad for p in model.parameters()] == flags and not all(flags)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(m.training for m in model.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(p.grad is None for p in model.parameters())


# --- candidates -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", ["channel", "tensor"])
@pytest.mark.parametrize("family", ["opt", "llama_gqa"])
def test_candidates_cost_what_the_layers_will(family: str, granularity: str) -> None:
    """The cost of every candidate is that of the `W8A8Linear` with its settings, including the bias."""
    model = make_model(family)
    config = STATIC.replace(weight_granularity=granularity)
    statistics = calibrate_model(model, DATA[:4], progress=False)
    q = "model.decoder.layers.1.self_attn" if family == "opt" else "model.layers.1.self_attn"
    group = Group(tuple(f"{q}.{n}_proj" for n in "qkv"))
    recording = record(model, [group], [{"input_ids": b} for b in DATA[4:]])
    space = Space(model, statistics, config)
    result = space.explore(group, ["static", "per_tensor", "per_token"], recording)
    x = recording.x[group.linears[0]]
    assert {c.scheme for c in result.tried} == {"static", "per_tensor", "per_token"}
    assert {c.alpha for c in result.tried} > set(ALPHAS)
    assert sum(c.clip < 1 for c in result.tried) >= 5
    assert {c.rotation for c in result.tried} == {32, 8, 0} and result.rotation == 32
    with torch.no_grad():
        for choice in result.tried:
            assert choice.alpha is not None
            norms = config.norms_of(choice.scheme, rotated=choice.rotation > 0)
            s = group_factors(model, group, statistics, choice.alpha, norms, config)
            scale = choice.clip * statistics.range_of(group.linears[0], s, choice.rotation) / 127
            cost = 0.0
            for name in group.linears:
                layer = W8A8Linear.from_linear(
                    linear := model.get_submodule(name),
                    activation_scheme=choice.scheme,
                    weight_granularity=granularity,
                    smooth=s,
                    rotation=choice.rotation,
                    x_scale=scale if choice.scheme == "static" else None,
                )
                parts = x.split(recording.rows[group.linears[0]])
                error = torch.cat([layer(p) - linear(p) for p in parts])
                cost += recording.cost(name, error)
            # The float product of all rows may add in another order than that of a part.
            assert choice.cost == pytest.approx(cost, rel=1e-4), choice


def test_without_smoothing_only_clipping_is_searched() -> None:
    result = searched(make_model("llama"), STATIC.replace(smooth=False))
    assert {(c.alpha, c.scheme) for g in result.groups for c in g.tried} == {(None, "static")}
    assert result.config.alphas == {} and not result.config.smooth
    assert all(0 < clip < 1 for clip in result.config.clips.values())


def test_the_fixed_scheme_of_a_layer_is_kept() -> None:
    config = STATIC.replace(schemes={"*.down_proj": "per_tensor"})
    result = searched(make_model("llama"), config, per_token_share=0.0)
    for group in result.groups:
        schemes = {c.scheme for c in group.tried}
        down = group.linears[0].endswith("down_proj")
        assert schemes == ({"per_tensor"} if down else {"static"})


# --- decisions --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["per_token", "per_tensor", "static"])
def test_the_cheapest_candidates_are_chosen(scheme: str) -> None:
    model = make_model("llama")
    result = searched(model, SmoothQuantConfig(activation_scheme=scheme), per_token_share=0.25)
    assert len(result.groups) == 8
    freed = [g for g in result.groups if g.linears[0] in result.config.schemes]
    assert len(freed) == (0 if scheme == "per_token" else 2)
    gains = {g.linears: g.best(scheme).cost - g.best("per_token").cost for g in result.groups}
    if freed:
        assert min(gains[g.linears] for g in freed) >= sorted(gains.values())[-2]
    total = 0.0
    for group in result.groups:
        best = group.best("per_token" if group in freed else scheme)
        total += best.cost
        assert best.cost == min(c.cost for c in group.tried if c.scheme == best.scheme)
        for name in group.linears:
            if result.kept == "searched":
                assert result.config.alphas[name] == best.alpha
                assert result.config.clip_of(name) == best.clip
    assert result.searched_cost == pytest.approx(total)
    costs = {a: [g.at(scheme, a) for g in result.groups] for a in ALPHAS}
    assert result.fixed_cost <= min(sum(c.cost for c in at if c) for at in costs.values()) * (
        1 + 1e-12
    )
    assert result.searched_cost <= result.fixed_cost
    smooth_and_quantize(model, DATA, result.config, progress=False)
    layers = layers_of(model)
    for name, alpha in result.config.alphas.items():
        assert layers[name]["alpha"] == alpha
        assert layers[name]["activation_scheme"] == result.config.schemes.get(name, scheme)


@pytest.mark.parametrize("worse", [True, False])
def test_the_fixed_alpha_is_kept_if_the_search_loses(
    worse: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[SmoothQuantConfig]] = []

    def validate(_: Any, __: Any, fixed: list[SmoothQuantConfig], *___: Any) -> Any:
        seen.append(fixed)
        return Validation(100, 0.01, 0.02, 0.01, 0.009 if worse else 0.011), len(fixed) - 1

    monkeypatch.setattr(search_module, "_validate", validate)
    result = searched(make_model("llama"))
    assert result.kept == ("fixed" if worse else "searched")
    assert seen[0][0] == STATIC and seen[0][-1].alpha == result.fixed_alpha
    assert (result.config == seen[0][-1]) == worse
    assert (result.config.alphas == {}) == worse


def test_few_predictions_have_no_standard_error() -> None:
    """Without a standard error the smaller mean decides. A NaN difference always counts against the search."""
    assert not Validation(3, 0.02, 0.01, -0.01, None).worse
    assert Validation(3, 0.01, 0.02, 0.01, None).worse
    assert Validation(9, 0.01, 0.02, float("nan"), 0.1).worse


def test_clips_are_searched_not_inherited(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[SmoothQuantConfig] = []
    outcome = Validation(9, 1, 0, -1, 0.1), 0
    monkeypatch.setattr(search_module, "_validate", lambda *a: seen.extend(a[2]) or outcome)
    searched(make_model("gpt2"), STATIC.replace(clips={"*": 0.05}))
    assert all(config.clips == {} for config in seen)


def test_validation_measures_both_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """The validation uses batches that nothing else used. It equals quantizing and comparing by hand."""
    model = make_model("llama")
    used: list[Any] = []
    original = search_module._validate

    def validate(*args: Any) -> Any:
        used.append(args)
        return original(*args)

    monkeypatch.setattr(search_module, "_validate", validate)
    result = searched(model)
    _, statistics, fixed, chosen, unseen = used[0]
    assert [b["input_ids"].tolist() for b in unseen] == [d.tolist() for d in DATA[-2:]]
    assert statistics.tokens == 4 * 48
    means = []
    for config in (*fixed, chosen):
        quantized = smooth_and_quantize(copy.deepcopy(model), statistics, config, progress=False)
        with torch.no_grad():
            p = [torch.log_softmax(model(**b).logits.double(), -1) for b in unseen]
            q = [torch.log_softmax(quantized(**b).logits.double(), -1) for b in unseen]
        rows = [(a.exp() * (a - b)).sum(-1).mean() for a, b in zip(p, q, strict=True)]
        means.append(float(torch.stack(rows).mean()))
    assert result.validation is not None
    assert len(means) == 3  # the defaults, the cheapest alpha and the searched settings
    # float32 log-probabilities of about 5 are exact to 5e-7, and the sum cancels down to about 1e-5.
    assert result.validation.fixed_kl == pytest.approx(min(means[:2]), abs=1e-6)
    assert result.validation.searched_kl == pytest.approx(means[2], abs=1e-6)
    assert (result.fixed_alpha is None) == (means[0] < means[1])


def test_models_without_logits_are_searched() -> None:
    """Models without logits are compared by their other outputs."""
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64,
        image_size=16, patch_size=8,
    )  # fmt: skip
    vit = transformers.ViTModel(config).eval()
    data = [{"pixel_values": torch.randn(2, 3, 16, 16)} for _ in range(4)]
    result = searched(vit, data=data)
    assert result.validation is not None and result.validation.tokens > 0
    assert len(result.config.alphas) > 0 or result.kept == "fixed"


# --- interruptions and files ------------------------------------------------------------------------------------------


class Interrupted(Exception):
    """Stands for a power failure."""


def _interrupting(monkeypatch: pytest.MonkeyPatch, after: int) -> list[tuple[str, ...]]:
    original = Space.explore
    explored: list[tuple[str, ...]] = []

    def explore(self: Space, group: Group, *args: Any) -> GroupResult:
        if len(explored) == after:
            raise Interrupted
        explored.append(group.linears)
        return original(self, group, *args)

    monkeypatch.setattr(Space, "explore", explore)
    return explored


def test_an_interrupted_search_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, path = make_model("llama"), tmp_path / "new" / "search.json"
    whole = searched(model)
    with monkeypatch.context() as patch:
        first = _interrupting(patch, after=3)
        with pytest.raises(Interrupted):
            searched(model, path=path)
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    with pytest.raises(SmoothQuantError, match="was interrupted: run it again with this path"):
        SearchResult.load(path)
    with monkeypatch.context() as patch:
        second = _interrupting(patch, after=99)
        resumed = searched(model, path=path)
    assert len(first) == 3 and len(second) == 5 and not set(first) & set(second)
    assert resumed == whole == SearchResult.load(path)
    with monkeypatch.context() as patch:
        _interrupting(patch, after=0)
        assert searched(model, path=path) == whole  # a finished search is not repeated


def test_less_memory_does_not_change_the_result() -> None:
    model = make_model("llama_gqa")
    assert searched(model, max_bytes=1).groups == searched(model).groups


@pytest.fixture
def finished(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "search.json"
    searched(make_model("gpt2"), path=path)
    yield path


def test_the_file_of_another_search_is_refused(finished: Path) -> None:
    before = finished.read_bytes()
    other = make_model("gpt2")
    other.transformer.h[1].mlp.c_fc.weight.data[5, 5] += 1.0
    for call in (
        lambda: searched(other, path=finished),
        lambda: searched(make_model("gpt2"), STATIC.replace(alpha=0.3), path=finished),
        lambda: searched(make_model("gpt2"), data=DATA[::-1], path=finished),
        lambda: searched(make_model("gpt2"), tokens=48, path=finished),
    ):
        with pytest.raises(SmoothQuantError, match="holds the search of another model, other data"):
            call()
    assert finished.read_bytes() == before


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c.update(format="other"),
        lambda c: c.update(version=3),
        lambda c: c.pop("groups"),
        lambda c: c["groups"].__setitem__(0, {"linears": ["a"]}),
        lambda c: c["groups"][0]["tried"][0].update(unknown=1),
        lambda c: c["result"]["config"].update(alphas={"a": 7}),
        lambda c: c.update(result=[]),
        lambda c: c.update(digest=None),
    ],
)
def test_a_damaged_file_is_refused(finished: Path, change: Any) -> None:
    content = json.loads(finished.read_text())
    change(content)
    finished.write_text(json.dumps(content))
    with pytest.raises(SmoothQuantError, match=r"search\.json|mapping of layer names"):
        SearchResult.load(finished)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"data": DATA[:1]}, "at least three sequences of calibration data, got 2"),
        ({"per_token_share": 1.5}, "per_token_share must be in"),
        ({"tokens": 0}, "tokens and max_bytes >= 1"),
        ({"validation_tokens": -1}, "validation_tokens >= 0"),
        ({"path": "/proc/nowhere/search.json"}, "cannot be written"),
        ({"path": "/"}, "cannot be read"),
    ],
)
def test_wrong_requests_are_refused(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(SmoothQuantError, match=sentence):
        searched(make_model("gpt2"), **options)


def test_choices_are_compared_by_cost_then_order() -> None:
    a, b = Choice("static", 0.5, 1.0, 8, 2.0), Choice("static", 0.6, 1.0, 8, 2.0)
    c, other = Choice("per_token", 0.5, 1.0, 8, 1.0), Choice("static", 0.7, 1.0, 0, 3.0)
    group = GroupResult(("x",), (a, b, c, other))
    assert group.best("static") is a and group.at("static", 0.6) is b
    assert group.at("static", 0.7) is None
