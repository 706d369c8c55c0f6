"""Shards the int8 layers of a model that transformers loads with a tensor-parallel plan.

transformers shards parameters while it loads them and hooks the forward of every module of the plan. Int8 layers have
buffers, which it loads whole, and sums of their own, so its hooks on them are removed.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from smoothquant_kernels.errors import SmoothQuantError
from smoothquant_kernels.nn.kinds import are_quantized_experts


def float_placements(model: Any) -> dict[str, Any]:
    """How transformers has spread each float parameter: name -> (mesh, placements). Empty without such a plan."""
    if (getattr(model, "_tp_size", None) or 1) < 2:
        return {}
    from torch.distributed.tensor import DTensor

    return {
        name: (p.device_mesh, p.placements)
        for name, p in model.named_parameters(remove_duplicate=False)
        if isinstance(p, DTensor)
    }


def finish(model: Any, spread: dict[str, Any]) -> None:
    """Spreads the float parameters again, which were loaded whole, and shards the int8 layers.

    Args:
        model: what transformers has loaded, with all tensors in place.
        spread: what `float_placements` returned before.

    Raises:
        SmoothQuantError: as `parallelize_model`, or the installed transformers hooks modules in another way, or the
            model has int8 experts, whose sums transformers' hooks would add up once for each process.
    """
    if (getattr(model, "_tp_size", None) or 1) < 2:
        return
    if whole_experts := [n for n, m in model.named_modules() if are_quantized_experts(m)]:
        raise SmoothQuantError(
            f"{whole_experts[0]} holds int8 experts, which no tp_plan of transformers can spread: load the model with "
            "load_quantized on every process and call parallelize_model, where experts stay whole, or skip them."
        )
    from torch.distributed.tensor import DTensor, distribute_tensor

    from smoothquant_kernels.nn.parallel.model import apply, check, group_of, plan_of, resolve

    made: dict[nn.Parameter, nn.Parameter] = {}
    for name, (mesh, placements) in spread.items():
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        whole = module._parameters[leaf]
        if isinstance(whole, DTensor):
            continue
        if whole not in made:
            # Every rank has read it, so nothing is sent.
            part = distribute_tensor(whole.detach(), mesh, placements, src_data_rank=None)
            made[whole] = nn.Parameter(part, requires_grad=whole.requires_grad)
        module._parameters[leaf] = made[whole]
    styles = resolve(model, plan_of(model), "agreed", float_layers=False)
    if not styles:
        return
    ranks = group_of(model._device_mesh)
    check(model, styles, ranks.world)
    for name in styles:
        layer = model.get_submodule(name)
        layer.__dict__.pop("forward", None)  # the hook of transformers, which makes DTensors
        if layer._forward_pre_hooks or layer._forward_hooks:
            import transformers

            raise SmoothQuantError(
                f"int8 layers cannot follow the hooks of tp_plan in transformers {transformers.__version__}: upgrade "
                "it, or call load_quantized on every process and then parallelize_model."
            )
    apply(model, styles, ranks)
