"""Names and patterns that match no layer are refused before anything changes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from smoothquant_kernels import (
    SmoothQuantConfig,
    SmoothQuantError,
    W8A8Linear,
    calibrate_model,
    quantize_model,
    smooth_and_quantize,
    smooth_lm,
)
from smoothquant_kernels.search.search import search_config
from smoothquant_kernels.smoothing.patterns import check_patterns, patterns_within
from smoothquant_kernels.streaming.stream import quantize_streamed
from tests.support.models import make_model, token_batches

SETTINGS: dict[str, Callable[[str], Any]] = {
    "skip": lambda p: (p,),
    "alphas": lambda p: {p: 0.5},
    "schemes": lambda p: {p: "per_token"},
    "clips": lambda p: {p: 0.9},
}


def with_statistics(model: nn.Module, config: SmoothQuantConfig) -> None:
    smooth_lm(model, calibrate_model(model, token_batches(), progress=False), config=config)


ENTRIES: dict[str, Callable[[nn.Module, SmoothQuantConfig], Any]] = {
    "quantize_model": lambda m, c: quantize_model(m, config=c),
    "smooth_lm": lambda m, c: smooth_lm(m, token_batches(), config=c, progress=False),
    "smooth_lm, measured before": with_statistics,
    "smooth_and_quantize": lambda m, c: smooth_and_quantize(m, token_batches(), c, progress=False),
    "calibrate_model": lambda m, c: calibrate_model(m, token_batches(), c, progress=False),
    "search_config": lambda m, c: search_config(m, token_batches(), c, progress=False),
}


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("entry", ENTRIES)
def test_a_misspelled_pattern_is_refused_before_any_change(entry: str, setting: str) -> None:
    model = make_model("llama")
    before = copy.deepcopy(model.state_dict())
    config = SmoothQuantConfig(**{setting: SETTINGS[setting]("*.mlp.downproj")})
    with pytest.raises(SmoothQuantError) as error:
        ENTRIES[entry](model, config)
    assert str(error.value) == (
        f"{setting}: '*.mlp.downproj' matches no layer of LlamaForCausalLM; did you mean '*.mlp.down_proj' or "
        "'*.down_proj'? A layer is given by its full name or by a shell-style pattern of it."
    )
    assert not any(isinstance(m, W8A8Linear) for m in model.modules())
    assert not hasattr(model, "smoothquant_info")
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(v, after[k]) for k, v in before.items())


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("model.layers.0.mlp.downproj", "did you mean 'model.layers.0.mlp.down_proj' or "),
        ("model.layers.7.mlp.down_proj", "layers.1.mlp.down_proj' or 'model.layers.0.mlp.down_proj'?"),
        ("layers.*.self_attn.o_proj", "did you mean '*.layers.*.self_attn.o_proj' or "),
        ("*.Down_Proj", "did you mean '*.down_proj'"),
        ("down_proj", "matches no layer of LlamaForCausalLM"),
        ("§", "matches no layer of LlamaForCausalLM. A layer"),
        ("", "'' matches no layer of LlamaForCausalLM"),
        # These match a module that is not a linear layer.
        ("*.mlp", "which holds linear layers but is none itself, so the setting would reach nothing; '*.mlp.*'"),
        ("model.layers.1", "'model.layers.1.*' reaches the layers inside"),
    ],
)  # fmt: skip
def test_the_error_suggests_similar_names(pattern: str, message: str) -> None:
    with pytest.raises(SmoothQuantError) as error:
        check_patterns(make_model("llama"), SmoothQuantConfig(skip=(pattern,)))
    assert message in str(error.value)


@pytest.mark.parametrize(
    "pattern",
    [
        "lm_head",
        "*",
        "*.o_proj",
        "model.layers.[01].mlp.*",
        "model.embed_tokens",
        "*norm",
        "*.mlp*",
    ],
)
def test_patterns_that_match_a_layer_are_accepted(pattern: str) -> None:
    """Layers that stay in float anyway may match as well."""
    config = SmoothQuantConfig(skip=(pattern,), alphas={pattern: 0.5})
    check_patterns(make_model("llama"), config)


def test_patterns_may_match_int8_layers_and_shared_modules() -> None:
    model = make_model("llama")
    layers: Any = model.get_submodule("model.layers")
    layers[1].mlp.up_proj = layers[0].mlp.up_proj
    config = SmoothQuantConfig(skip=("model.layers.1.mlp.up_proj", "*.down_proj"))
    quantize_model(model, config=config)
    check_patterns(model, config)
    check_patterns(model, SmoothQuantConfig(alphas={"*.o_proj": 0.5}))


def test_a_configuration_is_reduced_to_a_part_of_a_model() -> None:
    config = SmoothQuantConfig(
        skip=("*.a", "x.0.b"), alphas={"x.0.*": 0.1, "y.*": 0.2}, clips={"y.1.a": 0.9}
    )
    assert patterns_within(config, ["x.0.b", "x.0"]) == config.replace(
        skip=("x.0.b",), alphas={"x.0.*": 0.1}, clips={}
    )


def test_streaming_checks_the_names_of_the_whole_model(tmp_path: Path) -> None:
    """A pattern may match only one block. A pattern that matches no block is refused before any work."""
    source = tmp_path / "model"
    make_model("llama").save_pretrained(source)
    config = SmoothQuantConfig(alphas={"model.layers.1.mlp.down_proj": 0.3})
    ids = token_batches()
    made = quantize_streamed(source, tmp_path / "int8", ids, config, progress=False)
    assert made == tmp_path / "int8"
    with pytest.raises(SmoothQuantError, match=r"skip: 'model\.layers\.2\.\*' matches no layer"):
        quantize_streamed(
            source,
            tmp_path / "new",
            ids,
            SmoothQuantConfig(skip=("model.layers.2.*",)),
            progress=False,
        )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["int8", "model"]
