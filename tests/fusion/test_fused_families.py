"""Every architecture, optimized: what is fused, that nothing spills, that each call computes what the model does."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from smoothquant_kernels import ops
from smoothquant_kernels.fusion.forwards import FusedActivation, FusedLinear, FusedNorm
from smoothquant_kernels.fusion.norms import FLOAT32, ROUNDINGS
from smoothquant_kernels.fusion.optimize import (
    MOST_CHANGE,
    optimize_for_inference,
    relative_change,
    undo_optimization,
)
from smoothquant_kernels.fusion.record import fused_forwards, fusion_info, fusion_spills
from smoothquant_kernels.fusion.values import ActivatedValue, NormValue
from tests.support.families import FAMILIES
from tests.support.fusion import (
    SCHEMES,
    TABLE,
    TREATMENTS,
    Call,
    layers_of,
    outputs,
    quantized,
    recorded_calls,
    same_state,
    table,
)

#: Quick: one combination for each family, so that each combination is tried with several families.
COMBINATIONS = list(itertools.product(TREATMENTS, SCHEMES))
QUICK = [(f, *COMBINATIONS[i % len(COMBINATIONS)]) for i, f in enumerate(FAMILIES)]
SLOW = [
    pytest.param(f, *c, marks=pytest.mark.slow)
    for f in FAMILIES
    for c in COMBINATIONS
    if (f, *c) not in QUICK
]


def by_parts(call: Call) -> Tensor:
    """What a call computes, by the separate ops."""
    x, kwargs = call.args[0], dict(call.kwargs)
    gemm = {k: kwargs.pop(k) for k in ("bias", "residual") if k in kwargs}
    if call.op == "linear_s8":
        w_q, w_scale = call.args[1:]
        x_q, x_scale = ops.quantize(x, **kwargs)
    else:
        kind, w_q, w_scale = call.args[1:]
        norm = {k: kwargs.pop(k) for k in ("norm_weight", "norm_bias", "eps") if k in kwargs}
        if kind == "rms_norm":
            x_q, x_scale = ops.rms_norm_quantize(x, norm["norm_weight"], norm["eps"], **kwargs)
        elif kind == "layer_norm":
            factors = (norm["norm_weight"], norm.get("norm_bias"))
            x_q, x_scale = ops.layer_norm_quantize(x, *factors, norm["eps"], **kwargs)
        else:
            x_q, x_scale = ops.act_quantize(x, kind, **kwargs)
    return ops.gemm_s8(x_q, w_q, x_scale, w_scale, **gemm, out_dtype=x.dtype)


def check_values(model: Any) -> list[Any]:
    """Makes every norm and activation of an optimized model check its value against the module's own code."""
    checked = []
    for name, forward in fused_forwards(model).items():
        if isinstance(forward, FusedLinear):
            continue

        def call(x: Any, f: Any = forward, name: str = name) -> Any:
            value = type(f).__call__(f, x)
            if isinstance(value, NormValue):
                y = f.original(x)
                form = f.form
                parts = form.reference(f.module, x)
                # The roundings of the module's own code, as where a norm is recognized.
                bound = (ROUNDINGS * torch.finfo(y.dtype).eps + FLOAT32) * y.abs().amax(
                    -1, keepdim=True
                )
                assert ((parts - y.float()).abs() <= bound).all(), name
                checked.append(name)
            elif isinstance(value, ActivatedValue):
                checked.append(name)
            return value

        model.get_submodule(name).__dict__["forward"] = call
    return checked


@pytest.mark.parametrize(("family", "treatment", "scheme"), [*QUICK, *SLOW])
def test_each_call_computes_what_the_model_does(family: str, treatment: str, scheme: str) -> None:
    """Layer by layer, in exact terms. Each fused call has the bits of its separate ops; what those round otherwise than
    the module's own code stays within the bound by which the module was recognized; merging changes no bit.
    """
    plain = quantized(family, treatment, scheme)
    before = outputs(plain, FAMILIES[family].inputs(0))
    model = optimize_for_inference(copy.deepcopy(plain), FAMILIES[family].inputs(1))
    assert same_state(plain, model)
    forwards = fused_forwards(model)
    assert forwards
    with recorded_calls() as calls:
        after = outputs(model, FAMILIES[family].inputs(0))
    assert not fusion_spills(model)
    assert calls
    groups = {
        id(f.group): f.group for f in forwards.values() if isinstance(f, FusedLinear)
    }.values()
    by_weight = {g._operands[0].data_ptr(): g for g in groups}
    for call in calls:
        parts = by_parts(call)
        assert torch.equal(call.y, parts) or (call.y.isnan() == parts.isnan()).all()
        group = by_weight[call.args[-2].data_ptr()]
        start = 0
        for layer in group.layers:
            end = start + layer.out_features
            kwargs = {k: v for k, v in call.kwargs.items() if k != "bias"}
            own = Call(call.op, (*call.args[:-2], layer.w_q, layer.w_scale), kwargs, call.y)
            if layer.bias is not None:
                own.kwargs["bias"] = layer.bias
            assert torch.equal(call.y[..., start:end], by_parts(own))
            start = end
    # A value that rounds the other way is an int8 value one step off. Nothing of a broken fusion is as close as this.
    assert relative_change(before, after) <= MOST_CHANGE
    checked = check_values(model)
    outputs(model, FAMILIES[family].inputs(0))
    assert bool(checked) == any(
        isinstance(f, (FusedNorm, FusedActivation)) for f in forwards.values()
    )
    undone = undo_optimization(model)
    assert same_state(plain, undone) and not fused_forwards(undone) and not fusion_info(undone)
    for a, b in zip(before, outputs(undone, FAMILIES[family].inputs(0)), strict=True):
        assert torch.equal(a, b)
    shared = [t.untyped_storage().data_ptr() for m in layers_of(undone).values() for t in [m.w_q]]
    assert len(set(shared)) == len(shared)


def test_the_table_of_fused_families_is_up_to_date() -> None:
    if transformers.__version__ != "5.24.0":
        pytest.skip("the table was written with transformers 5.24.0")
    assert TABLE.read_text(encoding="utf-8") == table(), (
        "run python -m tests.support.fusion --write, and read the difference"
    )
