"""A search leaves an int8 output head to its defaults, and compares models that have it."""

from __future__ import annotations

from smoothquant_kernels import SmoothQuantConfig, W8A8Linear, search_config, smooth_and_quantize
from tests.support.models import token_batches
from tests.support.streams import family

DATA = token_batches(8)


def test_the_head_is_not_searched_but_validated() -> None:
    options = {"tokens": 96, "validation_tokens": 96, "progress": False}
    config = SmoothQuantConfig(activation_scheme="static")
    plain = search_config(family("tied"), DATA, config, **options)
    found = search_config(family("tied"), DATA, config.replace(quantize_head=True), **options)
    assert found.groups == plain.groups  # the head adds no group and changes no candidate
    assert found.config.quantize_head and "lm_head" not in found.config.alphas
    assert found.validation is not None and plain.validation is not None
    assert found.validation.fixed_kl != plain.validation.fixed_kl
    model = smooth_and_quantize(family("tied"), DATA, found.config, progress=False)
    assert type(model.lm_head) is W8A8Linear and model.lm_head.activation_scheme == "per_token"
