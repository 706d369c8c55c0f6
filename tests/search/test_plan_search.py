"""Choosing the format of each layer under a budget."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch

from smoothquant_kernels import SmoothQuantConfig, SmoothQuantError, quantize_model, smooth_lm
from smoothquant_kernels.nn.kinds import kind_of
from smoothquant_kernels.search.plan_search import Option, PlanSearch, allocate, joined, search_plan
from tests.support.models import make_model, token_batches

TWO = ({"format": "w8a8"}, {"format": "float"})


def option(nbytes: int, kl: float) -> Option:
    return Option({}, nbytes, kl)


def brute_force(options: list[list[Option]], max_bytes: int) -> float:
    """The least error of all choices that fit."""
    fitting = [c for c in itertools.product(*options) if sum(o.nbytes for o in c) <= max_bytes]
    return min(sum(o.kl for o in c) for c in fitting)


def test_steps_are_taken_by_gain_for_a_byte() -> None:
    options = {
        ("a",): [option(10, 8.0), option(20, 2.0), option(40, 0.0)],
        ("b",): [option(10, 5.0), option(20, 4.5), option(40, 0.0)],  # 20 is above the hull
        ("c",): [option(10, 1.0), option(20, 1.0), option(40, 3.0)],  # more bytes, no less error
    }
    at = {
        size: [o.nbytes for o in allocate(options, max_bytes=size).values()]
        for size in (30, 39, 40, 60, 70, 80, 90, 1000)
    }
    assert at == {
        30: [10, 10, 10], 39: [10, 10, 10], 40: [20, 10, 10], 60: [40, 10, 10], 70: [20, 40, 10],
        80: [20, 40, 10], 90: [40, 40, 10], 1000: [40, 40, 10],
    }  # fmt: skip
    for size in (30, 40, 70, 90):  # where the budget ends on the hull, greedy is optimal
        chosen = allocate(options, max_bytes=size)
        assert sum(o.kl for o in chosen.values()) == brute_force(list(options.values()), size)
    errors = {
        kl: sum(o.nbytes for o in allocate(options, max_kl=kl).values()) for kl in (14, 8, 3, 1)
    }
    assert errors == {14: 30, 8: 40, 3: 70, 1: 90}


def test_impossible_budgets() -> None:
    options = {("a",): [option(10, 8.0), option(20, 2.0)]}
    with pytest.raises(SmoothQuantError, match="fits into 9 bytes: the smallest one takes 10"):
        allocate(options, max_bytes=9)
    with pytest.raises(SmoothQuantError, match=r"divergence of 1.0: the best one has 2\."):
        allocate(options, max_kl=1.0)


def test_groups_of_several_candidates_are_joined() -> None:
    """One candidate has q, k and v smoothed together, another apart; no layer may count twice."""
    q, k, v, o = "qkvo"
    assert joined([(q, k, v), (o,), (q,), (k,), (v,), (o,)]) == [(q, k, v), (o,)]
    assert joined([(q,), (o,), (k,), (v,), (q, k, v)]) == [(q, k, v), (o,)]
    assert joined([(q, k), (o,), (k, v)]) == [(q, k, v), (o,)]
    assert joined([(q, k), (v, o), (k, v)]) == [(q, k, v, o)]
    assert joined([]) == []


def search(model: Any, **budget: Any) -> PlanSearch:
    return search_plan(
        model, token_batches(), SmoothQuantConfig(), candidates=TWO, progress=False, **budget
    )


def test_budgets_of_bytes() -> None:
    model = make_model("llama")
    before = copy.deepcopy(model.state_dict())
    everything = search(model, max_kl=0.0)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert everything.kl == 0.0 and {e["format"] for e in everything.plan.values()} == {"float"}
    int8 = sum(tried[0].nbytes for tried in everything.options.values())
    for size in (int8, (int8 + everything.nbytes) // 2):
        found = search(model, max_bytes=size)
        assert found.nbytes <= size
        quantized = smooth_lm(copy.deepcopy(model), token_batches(), config=found.config)
        quantize_model(quantized, config=found.config)
        formats = {
            name: "float" if kind_of(quantized.get_submodule(name)) is None else "w8a8"
            for name in found.plan
        }
        assert formats == {name: entry["format"] for name, entry in found.plan.items()}
    all_int8 = search(model, max_bytes=int8)
    assert {e["format"] for e in all_int8.plan.values()} == {"w8a8"} and all_int8.kl > 0.0
    half = search(model, max_kl=all_int8.kl / 2)
    assert 0.0 < half.kl <= all_int8.kl / 2 and int8 < half.nbytes < everything.nbytes


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({}, "give one of max_bytes and max_kl"),
        ({"max_bytes": 1, "max_kl": 1.0}, "give one of max_bytes and max_kl"),
        ({"max_kl": float("nan")}, "got max_bytes=None, max_kl=nan"),
        ({"max_bytes": 1, "tokens": 0}, "tokens=0"),
        ({"max_bytes": 1, "candidates": ()}, "and 0 candidates"),
        ({"max_bytes": 1, "candidates": ({"format": "int3"},)}, "formats must be a mapping"),
        ({"max_bytes": 1, "candidates": TWO}, "fits into 1 bytes: the smallest one takes"),
        (
            {"max_bytes": 1, "data": [token_batches()[0][:1]]},
            "at least two sequences of calibration data, got 1: some for the ranges, some to try candidates on; give",
        ),
    ],
)
def test_refusals(given: dict[str, Any], sentence: str) -> None:
    with pytest.raises(SmoothQuantError, match=sentence):
        search_plan(make_model("llama"), progress=False, **{"data": token_batches(), **given})
