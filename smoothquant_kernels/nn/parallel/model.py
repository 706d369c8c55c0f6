"""Spreads the layers of a model over the processes of a group, by the plans of transformers or of torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    parallelize_module,
)

from smoothquant_kernels.errors import SmoothQuantError
from smoothquant_kernels.nn.kinds import are_quantized_experts, is_quantized
from smoothquant_kernels.nn.linear import W8A8Linear
from smoothquant_kernels.nn.parallel.collectives import Group
from smoothquant_kernels.nn.parallel.linear import (
    become_colwise,
    become_rowwise,
    check_become_colwise,
    check_become_rowwise,
)
from smoothquant_kernels.nn.quantized_linear import QuantizedLinear


@dataclass
class ColwiseW8A8(ParallelStyle):
    """A style of torch's `parallelize_module` for a `W8A8Linear` whose output features are spread.

    Attributes:
        gather_output: whether every rank returns all output features, or only its own.

    Raises:
        SmoothQuantError: the module is not a whole `W8A8Linear`, or the ranks cannot share its features.

    Equivalent to:
        torch.distributed.tensor.parallel.ColwiseParallel, for int8 layers: bit for bit what one process computes

    Source: Megatron-LM (Shoeybi et al., 2019), section 3.
    """

    gather_output: bool = False

    def check(self, layer: nn.Module, world: int, name: str = "the layer") -> None:
        """Raises the error of `_apply`, without a change."""
        check_become_colwise(_plain(layer, name), world, name, gather_output=self.gather_output)

    def _apply(self, module: nn.Module, device_mesh: Any) -> nn.Module:
        become_colwise(
            _plain(module, "the layer"), group_of(device_mesh), gather_output=self.gather_output
        )
        return module


@dataclass
class RowwiseW8A8(ParallelStyle):
    """A style of torch's `parallelize_module` for a `W8A8Linear` that follows a column-wise layer.

    Attributes:
        scales: ``"agreed"`` or ``"own"``, as in `parallelize_model`.
        split_input: whether the layer receives all input features, or only this rank's part.

    Raises:
        SmoothQuantError: the module is not a whole `W8A8Linear`, the ranks cannot share its features, or `scales` is
            ``"own"`` and a part would cut a group of the rotation.

    Equivalent to:
        torch.distributed.tensor.parallel.RowwiseParallel, for int8 layers

    Source: Megatron-LM (Shoeybi et al., 2019), section 3.
    """

    scales: str = "agreed"
    split_input: bool = False

    def check(self, layer: nn.Module, world: int, name: str = "the layer") -> None:
        """Raises the error of `_apply`, without a change."""
        check_become_rowwise(
            _plain(layer, name), world, name, scales=self.scales, split_input=self.split_input
        )

    def _apply(self, module: nn.Module, device_mesh: Any) -> nn.Module:
        become_rowwise(
            _plain(module, "the layer"),
            group_of(device_mesh),
            scales=self.scales,
            split_input=self.split_input,
        )
        return module


#: transformers' names of the styles that shard. Those in the first row change what the neighbors receive, so a float
#: layer needs the same style; a float layer with one of the others may stay whole on every rank.
_SHARDED = ("colwise", "rowwise")
_INSIDE = ("colwise_gather_output", "colwise_rep", "rowwise_split_input", "rowwise_rep")
#: Styles under which every rank may keep the whole module, because its input and output are whole.
_WHOLE = (
    "embedding_rowwise",
    "embedding_colwise",
    "replicate",
    "replicated",
    "replicated_with_grad_allreduce",
    "mla_kv_a_proj",
)


def parallelize_model(
    model: nn.Module,
    group: Any = None,
    *,
    plan: str | Mapping[str, str] = "auto",
    scales: str = "agreed",
) -> nn.Module:
    """Spreads a quantized model over the processes of a group, each of which has loaded it. Changes it in place.

    Every rank then calls the model with the same input and gets the whole output. `generate` works alike.

    Args:
        model: the same quantized model on every rank, on its device.
        group: a `torch.distributed` process group, or a `DeviceMesh` of one dimension or with one named ``"tp"``.
            None takes the default group of all processes.
        plan: ``"auto"`` for the plan that transformers has for the model, or a mapping of module names, where ``*``
            stands for any part between dots, to transformers' styles: ``"colwise"``, ``"rowwise"``,
            ``"colwise_gather_output"`` and ``"rowwise_split_input"``. Modules that it does not name stay whole. So do
            embeddings and a float output head.
        scales: what row-wise layers (o_proj, down_proj) do. ``"agreed"`` gathers their input, so that every rank
            quantizes whole tokens with the scales of one process: the layers are exact. ``"own"`` quantizes each
            rank's channels with a scale of their own and adds the outputs: less to send, other rounding errors.

    Returns:
        The model. With ``"agreed"``, its int8 layers compute bit for bit what they do in one process.

    Raises:
        SmoothQuantError: there is no process group or no plan, a layer cannot be shared by so many ranks, or a style
            is unknown. The model is then unchanged.

    Equivalent to:
        AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto"), for a model that is in memory

    Source: Megatron-LM (Shoeybi et al., 2019), section 3; Hugging Face transformers, `tp_plan`.
    """
    if isinstance(plan, str) and plan != "auto":
        raise SmoothQuantError(
            f'plan must be "auto" or a mapping of modules to styles; got {plan!r}.'
        )
    ranks = group_of(group)
    named = plan_of(model) if isinstance(plan, str) else dict(plan)
    styles = resolve(model, named, scales)
    check(model, styles, ranks.world)
    apply(model, styles, ranks)
    if hasattr(model, "_tp_size"):
        # generate of transformers reads both when it makes a static cache for a rank's heads
        whole: Any = model
        whole._tp_size, whole._tp_plan = ranks.world, named
    return model


def group_of(group: Any) -> Group:
    """The ranks of a process group, a mesh or, for None, of all processes.

    Raises:
        SmoothQuantError: torch.distributed is not initialized, or the mesh has several dimensions and none for this.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise SmoothQuantError(
            "there is no process group: start the script with torchrun and call torch.distributed.init_process_group."
        )
    if isinstance(group, DeviceMesh):
        if group.ndim > 1:
            if "tp" not in (group.mesh_dim_names or ()):
                raise SmoothQuantError(
                    f'the mesh has {group.ndim} dimensions and none is named "tp": pass one dimension of it.'
                )
            group = group["tp"]
        group = group.get_group()
    return Group(dist.group.WORLD if group is None else group)


def plan_of(model: nn.Module) -> dict[str, str]:
    """transformers' plan for the model: patterns of module names -> styles.

    Raises:
        SmoothQuantError: it has none.
    """
    found = getattr(model, "tp_plan", None) or getattr(model, "_tp_plan", None)
    if not found:
        raise SmoothQuantError(
            f"transformers has no plan for a {type(model).__name__}: pass plan= with the style of each layer."
        )
    return dict(found)


def resolve(
    model: nn.Module, plan: Mapping[str, str], scales: str, *, float_layers: bool = True
) -> dict[str, ParallelStyle]:
    """The module names of the model -> their styles. Modules that stay whole are left out.

    Args:
        model: the model; not changed.
        plan: patterns of module names -> transformers' styles.
        scales: those of row-wise int8 layers.
        float_layers: False leaves out all modules that are not quantized, whatever their styles.

    Raises:
        SmoothQuantError: a style is not known for its module, or one module has two.
    """
    patterns = [(_pattern(key), style) for key, style in plan.items()]
    found: dict[str, ParallelStyle] = {}
    first: dict[nn.Module, tuple[str, str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        named = next((style for p, style in patterns if p.fullmatch(name)), None)
        if named is None or not (float_layers or is_quantized(module)):
            continue
        other, before = first.setdefault(module, (name, named))
        if before != named:
            raise SmoothQuantError(
                f"{name} and {other} are one layer, and the plan has {named} and {before} for them: give both the same."
            )
        if other != name:
            continue
        style = _style(name, module, named, scales)
        if style is not None:
            found[name] = style
    return found


def _pattern(key: str) -> re.Pattern[str]:
    return re.compile(re.escape(key).replace(r"\*", r"[^.]+"))


def _style(name: str, module: nn.Module, named: str, scales: str) -> ParallelStyle | None:
    """The style of one module; None if it stays whole."""
    if named in _WHOLE or are_quantized_experts(module):
        return None  # int8 experts: each process computes all of them
    if named in (*_SHARDED, *_INSIDE) and is_quantized(module):
        if named.startswith("colwise"):
            return ColwiseW8A8(gather_output=named != "colwise")
        return RowwiseW8A8(scales=scales, split_input=named != "rowwise")
    if named in _INSIDE:
        return None
    if named in _SHARDED and isinstance(module, nn.Linear):
        return ColwiseParallel() if named == "colwise" else RowwiseParallel()
    raise SmoothQuantError(
        f"the plan has the style {named!r} for {name}, a {type(module).__name__}, which it does not fit: pass plan= "
        f"without it if the module may stay whole, or with one of {', '.join((*_SHARDED, *_INSIDE))} for a linear."
    )


def check(model: nn.Module, styles: Mapping[str, ParallelStyle], world: int) -> None:
    """Raises SmoothQuantError unless `world` ranks can share every layer. Changes nothing."""
    if not any(isinstance(style, (ColwiseW8A8, RowwiseW8A8)) for style in styles.values()):
        raise SmoothQuantError(
            "the plan names no quantized layer of the model: pass one that does, or use torch's parallelize_module."
        )
    for name, style in styles.items():
        layer: Any = model.get_submodule(name)
        if isinstance(style, (ColwiseW8A8, RowwiseW8A8)):
            style.check(layer, world, name)
        sizes = (layer.out_features, layer.in_features)
        if not isinstance(style, (ColwiseW8A8, RowwiseW8A8)) and any(
            size % world for size in sizes
        ):
            raise SmoothQuantError(
                f"the float layer {name} has {sizes[1]} input and {sizes[0]} output features, which {world} ranks "
                "cannot share evenly: use a number of ranks that divides both."
            )
        if isinstance(style, ColwiseParallel) or style == ColwiseW8A8():
            _check_heads(model, name, layer.out_features, world)


def _check_heads(model: nn.Module, name: str, features: int, world: int) -> None:
    """Attention reshapes its part by the size of a head, and would take halves of two heads for one."""
    size = getattr(model.get_submodule(name.rpartition(".")[0]), "head_dim", None)
    if isinstance(size, int) and size > 0 and features % size == 0 and features // size % world:
        raise SmoothQuantError(
            f"{name} makes {features // size} heads of {size} features, which {world} ranks cannot share evenly: use a "
            "number of ranks that divides the key and value heads."
        )


def apply(model: nn.Module, styles: Mapping[str, ParallelStyle], ranks: Group) -> None:
    """Shards the layers, after `check`."""
    mesh = None
    for name, style in styles.items():
        layer: Any = model.get_submodule(name)
        if isinstance(style, ColwiseW8A8):
            become_colwise(layer, ranks, name=name, gather_output=style.gather_output)
        elif isinstance(style, RowwiseW8A8):
            become_rowwise(
                layer, ranks, name=name, scales=style.scales, split_input=style.split_input
            )
        else:
            if mesh is None:
                mesh = DeviceMesh.from_group(ranks.group, layer.weight.device.type)
            parallelize_module(layer, mesh, style, src_data_rank=None)


def _plain(module: nn.Module, name: str) -> W8A8Linear:
    """The module as a W8A8Linear; a subclass of someone else's may not be one after its class changes."""
    if isinstance(module, W8A8Linear) and (module.part or type(module) is W8A8Linear):
        return module
    if isinstance(module, QuantizedLinear) and not isinstance(module, W8A8Linear):
        raise SmoothQuantError(
            f"{name} is a {type(module).__name__}, which ranks cannot share: pass plan= without it, or quantize it as "
            "a W8A8Linear (`formats`, `outlier_layers`)."
        )
    raise SmoothQuantError(
        f"{name} is a {type(module).__name__} and this style is for a W8A8Linear: quantize the model first, or use "
        "torch's style for float layers."
    )
