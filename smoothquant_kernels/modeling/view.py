"""Finding and replacing layers in a model, and running it on a batch."""

from __future__ import annotations

import contextlib
import dataclasses
import fnmatch
import inspect
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.utils import _pytree as pytree

from smoothquant_kernels._attached import keeps_float
from smoothquant_kernels._foreign import check_float_model
from smoothquant_kernels.errors import SmoothQuantError
from smoothquant_kernels.linear import W8A8Linear, is_conv1d, is_float_linear, weight_of
from smoothquant_kernels.reference import MAX_K

Batch = Mapping[str, Tensor]


def output_heads(model: nn.Module) -> set[str]:
    """Names of the modules that turn hidden states into logits; they stay in float, as in the paper."""
    getter: Any = getattr(model, "get_output_embeddings", None)
    head = None if getter is None else getter()
    names = {name for name, module in model.named_modules() if head is not None and module is head}
    return names | {n for n, _ in model.named_modules() if n.rsplit(".", 1)[-1] == "lm_head"}


def partition_linears(
    model: nn.Module, skip: tuple[str, ...] = ()
) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """The float linears to quantise, and those left in float with the reason.

    Raises:
        SmoothQuantError: there is no linear layer to quantise, or another tool has quantized the model.
    """
    check_float_model(model)
    if is_float_linear(model):
        raise SmoothQuantError(
            f"the model is itself a {type(model).__name__}, so there is no place where its int8 layer could be put: "
            "pass a module around it, such as nn.Sequential(layer), or use W8A8Linear.from_linear(layer)."
        )
    check_whole(model)
    heads = output_heads(model)
    chosen: dict[str, nn.Module] = {}
    skipped: dict[str, str] = {}
    quantized = 0
    for name, module in model.named_modules():
        quantized += isinstance(module, W8A8Linear)
        if not is_float_linear(module):
            if holds_matrices(module):
                what = (
                    "expert weights"
                    if "expert" in f"{name}.{type(module).__name__}".lower()
                    else "weights"
                )
                skipped[name] = f"{what} in one 3-D parameter: stay in float"
            elif getattr(module, "original_name", "") == "Linear":  # of a torch.jit.ScriptModule
                skipped[name] = "TorchScript: stays in float"
            continue
        pattern = next((p for p in skip if fnmatch.fnmatchcase(name, p)), None)
        if pattern is not None:
            skipped[name] = f"matches the skip pattern {pattern!r}"
        elif name in heads:
            skipped[name] = "output head: stays in float"
        elif (attached := keeps_float(module)) is not None:
            skipped[name] = attached
        elif not weight_of(module).numel():
            skipped[name] = "it has no inputs or no outputs: stays in float"
        elif weight_of(module).shape[1] > MAX_K:
            skipped[name] = f"more than {MAX_K} input features: an int32 sum could overflow"
        elif not weight_of(module).is_floating_point():
            skipped[name] = f"weight is {weight_of(module).dtype}, not float"
        elif is_read_by_others(module):
            skipped[name] = "its weight is read by nn.MultiheadAttention: stays in float"
        elif not computes_linear(module):
            skipped[name] = f"{type(module).__name__} computes more than a linear: stays in float"
        else:
            chosen[name] = module
    if not chosen:
        if quantized:
            raise SmoothQuantError(f"the model is quantised already ({quantized} W8A8Linear).")
        raise SmoothQuantError(
            f"no linear layer to quantise in {type(model).__name__}: expected nn.Linear or Conv1D modules"
            + (f"; {len(skipped)} were skipped." if skipped else ".")
        )
    return chosen, skipped


def holds_matrices(module: nn.Module) -> bool:
    """Whether a module keeps several matrices in one 3-D parameter, as `transformers` 5 keeps experts."""
    return not isinstance(module, _ConvNd) and any(
        p.dim() == 3 and min(p.shape) > 1 and p.is_floating_point()
        for p in module.parameters(recurse=False)
    )


def is_read_by_others(module: nn.Module) -> bool:
    """Whether another module uses this linear's weight and never calls it: `nn.MultiheadAttention` and its out_proj."""
    return isinstance(module, NonDynamicallyQuantizableLinear)


def computes_linear(module: nn.Module) -> bool:
    """Whether a linear with a forward of its own (Falcon's; a router that returns scores too) is one still: tried."""
    if type(module).forward is nn.Linear.forward or is_conv1d(module):
        return True
    weight = weight_of(module)
    if weight.is_meta:
        return True
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, weight.shape[1], generator=generator).to(weight.device, weight.dtype)
    try:
        with torch.no_grad():
            got = module(x)
    except Exception:  # it wants other arguments, and says so in its own way
        return False
    expected = F.linear(x, weight, getattr(module, "bias", None))
    if not isinstance(got, Tensor) or got.shape != expected.shape or got.dtype != expected.dtype:
        return False
    # the order of K additions, and the rounding to a narrow type
    bound = 8 * torch.finfo(x.dtype).eps * (x.float().abs() @ weight.detach().float().abs().t() + 1)
    return bool(((got - expected).float().abs() <= bound).all())


def is_channelwise(module: nn.Module) -> bool:
    """Whether a module may be a norm by its shape: all it has are vectors of one length, whatever their names."""
    parameters = list(module.parameters(recurse=False))
    return (
        bool(parameters)
        and len({tuple(p.shape) for p in parameters}) == 1
        and parameters[0].dim() == 1
        and not any(True for _ in module.children())
    )


def check_present(model: nn.Module, prefix: str = "") -> None:
    """Raises SmoothQuantError if a parameter has no data: it is on the meta device, or accelerate has offloaded it."""
    name = next((n for n, p in model.named_parameters(prefix) if p.is_meta), None)
    if name is not None:
        raise SmoothQuantError(
            f"{name} has no data (meta device; accelerate puts offloaded weights there): load the model without "
            "offloading, or use smoothquant_kernels.stream.quantize_streamed, which reads one block at a time."
        )


def check_whole(model: nn.Module) -> None:
    """Raises SmoothQuantError if a parameter is a DTensor, of which each process has a part."""
    for name, parameter in model.named_parameters():
        if any(t.__module__.startswith("torch.distributed.") for t in type(parameter).__mro__):
            raise SmoothQuantError(
                f"{name} is a {type(parameter).__name__}, spread over processes (fully_shard, tensor parallelism): "
                "smooth and quantize the model first, and spread the result."
            )


def module_places(model: nn.Module, module: nn.Module) -> list[tuple[nn.Module, str]]:
    """Every place of a module in a model, as (parent, attribute): it may have several names."""
    names = [n for n, m in model.named_modules(remove_duplicate=False) if m is module]
    parts = [name.rpartition(".") for name in names]
    return [(model.get_submodule(parent), child) for parent, _, child in parts]


def put_module(places: Iterable[tuple[nn.Module, str]], module: nn.Module) -> None:
    """Puts a module into all the places."""
    for parent, child in places:
        setattr(parent, child, module)


def replace_module(model: nn.Module, name: str, new: nn.Module) -> None:
    """Puts `new` where the module `name` is, and under every other name that the same module has."""
    put_module(module_places(model, model.get_submodule(name)), new)


def shared_parameters(model: nn.Module) -> dict[str, list[str]]:
    """Parameter names that denote one tensor: each name -> the others."""
    names: dict[int, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[parameter.data_ptr() if not parameter.is_meta else id(parameter)].append(name)
    return {
        n: [o for o in group if o != n] for group in names.values() for n in group if len(group) > 1
    }


def model_device(model: nn.Module) -> torch.device:
    """Where the inputs go: the device of the first parameter."""
    first = next(iter(model.parameters()), None)
    return torch.device("cpu") if first is None else first.device


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """No gradients, and evaluation mode for the time of the block; each module gets its own mode back.

    Compiled models run eagerly: a graph that is compiled already calls no hooks, and no operation of it can be watched.
    """
    training = [m for m in model.modules() if m.training]
    model.eval()
    # nothing is compiled where dynamo was never loaded, and loading it takes a second
    compiled = "torch._dynamo" in sys.modules
    stance = torch.compiler.set_stance("force_eager") if compiled else contextlib.nullcontext()
    try:
        with stance, torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def run(model: nn.Module, batch: Batch, *, logits: bool = True) -> Any:
    """The model's output on one batch, without a key-value cache; `logits=False` saves most of the output head."""
    extra: dict[str, Any] = {}
    parameters = inspect.signature(model.forward).parameters
    if hasattr(model, "config") and "use_cache" not in batch and "use_cache" in parameters:
        extra["use_cache"] = False
    whole = (
        "labels" in batch or "logits_to_keep" in batch
    )  # a loss needs the logits of all its labels
    if not logits and "logits_to_keep" in parameters and not whole:
        extra["logits_to_keep"] = 1
    device = model_device(model)
    return model(**{k: v.to(device) for k, v in batch.items()}, **extra)


def run_changed(model: nn.Module, batch: Batch) -> Any:
    """`run` for a model some of whose tensors were changed on purpose; None if it cannot compute with them.

    A router that sends another number of tokens to an expert makes shapes that the recorded tensors do not have.
    """
    try:
        return run(model, batch)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, IndexError, ValueError):
        return None


def tensors_in(tree: Any) -> Iterator[Tensor]:
    """All tensors of nested containers, those among them that pytree takes for leaves: mappings and dataclasses."""
    for leaf in pytree.tree_leaves(tree):
        if isinstance(leaf, Tensor):
            yield leaf
        elif isinstance(leaf, Mapping):
            yield from tensors_in(list(leaf.values()))
        elif dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            yield from tensors_in(list(vars(leaf).values()))


def output_tensors(output: Any) -> list[Tensor]:
    """Every float tensor of a model's output; the logits first where there are any.

    Raises:
        SmoothQuantError: the output holds no float tensor.
    """
    logits = getattr(output, "logits", None)
    first = [logits] if isinstance(logits, Tensor) else []
    tensors = [t for t in (*first, *tensors_in(output)) if t.is_floating_point()]
    if not tensors:
        raise SmoothQuantError(
            f"the model returned no float tensor to compare ({type(output).__name__})."
        )
    return list({id(t): t for t in tensors}.values())


def output_tensor(output: Any) -> Tensor:
    """The tensor that stands for an output: the logits where there are any, else the first float tensor.

    Raises:
        SmoothQuantError: the output holds no float tensor.
    """
    return output_tensors(output)[0]


def _first(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    return args[0] if args else next(iter(kwargs.values()), None)


def _with_first(
    args: tuple[Any, ...], kwargs: dict[str, Any], value: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if args:
        return (value, *args[1:]), kwargs
    name = next(iter(kwargs))
    return args, {**kwargs, name: value}


class Hooks:
    """Forward hooks that are removed at the end of a `with` block."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._handles: list[Any] = []

    def __enter__(self) -> Hooks:
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def on_input(self, name: str, change: Callable[[Tensor], Tensor | None]) -> None:
        """Calls `change` with the module's input; what it returns, if anything, replaces the input."""

        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            new = change(_first(args, kwargs))
            return None if new is None else _with_first(args, kwargs, new)

        module = self._model.get_submodule(name)
        self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def on_output(self, name: str, change: Callable[[Tensor], Tensor | None]) -> None:
        """Calls `change` with the module's output; what it returns, if anything, replaces the output."""

        def hook(_: nn.Module, __: Any, output: Any) -> Any:
            return change(output) if isinstance(output, Tensor) else None

        self._handles.append(self._model.get_submodule(name).register_forward_hook(hook))


def token_mask(batch: Batch, name: str = "attention_mask") -> Tensor | None:
    """[B, T] bool, False at padding; None where the batch has no such mask, or one that is added to scores."""
    mask = batch.get(name)
    if mask is None or mask.dim() != 2 or (mask.is_floating_point() and bool((mask < 0).any())):
        return None
    return mask.bool()


def unpadded_rows(t: Tensor, keep: Tensor | None) -> Tensor:
    """[M, last dimension]: the rows of t that `keep` [rows] has, as `_padding.Padding.keep` makes it; None: all."""
    rows = t.reshape(-1, t.shape[-1])
    return rows if keep is None else rows[keep]
