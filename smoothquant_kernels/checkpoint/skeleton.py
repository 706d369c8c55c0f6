"""Models without weights, made from a checkpoint's description, that can take its tensors."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from smoothquant_kernels.checkpoint.manifest import Manifest
from smoothquant_kernels.checkpoint.ties import keep_heads_apart
from smoothquant_kernels.errors import SmoothQuantError
from smoothquant_kernels.modeling.changes import replace_module
from smoothquant_kernels.nn import kinds
from smoothquant_kernels.nn.float_linear import is_float_linear, weight_of

QUANT_METHOD = "smoothquant_kernels"
# config.json does not say which attention runs, but the bits of the logits depend on it. Only torch's own are allowed,
# because the name of any other may be a repository whose code transformers would fetch and run.
ATTENTIONS = ("eager", "sdpa")
_IMPLEMENTATIONS = ("attn_implementation", "experts_implementation")
_CODE_KEYS = {"auto_map", *_IMPLEMENTATIONS, *(f"_{n}" for n in _IMPLEMENTATIONS)}
_CODE_KEYS |= {f"_{n}_internal" for n in _IMPLEMENTATIONS}

_FLOAT_TAG = "__float__"
_FLOATS = {"Infinity": math.inf, "-Infinity": -math.inf, "NaN": math.nan}


# --- transformers models ----------------------------------------------------------------------------------------------


def is_transformers(cls: type) -> bool:
    """Whether transformers defines this class. Does not import transformers."""
    return cls.__module__.startswith("transformers.models.")


def configurations(model: nn.Module) -> list[Any]:
    """The configurations of a transformers model and of the models inside it."""
    from transformers import PreTrainedModel

    return [module.config for module in model.modules() if isinstance(module, PreTrainedModel)]


def find_class(name: str) -> type[Any]:
    """Returns the transformers model class of this name. Never looks up or fetches other code.

    Raises:
        SmoothQuantError: the installed release has no such class.
    """
    import transformers

    found = getattr(transformers, name, None)
    if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
        raise SmoothQuantError(
            f"transformers {transformers.__version__} has no model class {name}: install the release that the "
            "checkpoint was made with, or pass model= with a model of that class."
        )
    return found


def config_json(model: Any) -> str:
    """The text of config.json. Its quantization_config says that the weights are not plain floats."""
    values = json.loads(model.config.to_json_string())
    values["architectures"] = [type(model).__name__]
    described = description(model)
    values["dtype"] = described["dtype"]
    values.pop("quantization_config", None)  # what the model had when it was quantized
    values["quantization_config"] = {"quant_method": QUANT_METHOD, **described}
    return json.dumps(values, indent=2) + "\n"


def description(model: Any) -> dict[str, Any]:
    """What quantization_config says of a transformers model: its replaced modules, its type and its attention."""
    modules, shared = describe_modules(model)
    found: dict[str, Any] = {"modules": modules, "shared_modules": shared}
    found["dtype"] = str(model.dtype).removeprefix("torch.")
    attention = getattr(model.config, "_attn_implementation", None)
    return found | ({"attention": attention} if attention in ATTENTIONS else {})


def with_weights(config_text: str, file: str) -> str:
    """The text of config.json with the name of the weight file or of the index, which `from_pretrained` looks for."""
    values = json.loads(config_text)
    values["quantization_config"]["weights"] = file
    return json.dumps(values, indent=2) + "\n"


def build(cls: type[Any], config_text: str, attention: str) -> nn.Module:
    """Builds the model of a class and config.json: parameters on the meta device, buffers computed.

    Raises:
        SmoothQuantError: the class cannot be built from the configuration.
    """
    from accelerate import init_empty_weights

    try:
        values = _without_code(plain_floats(json.loads(config_text)))
        # The loaded model has replaced modules, so transformers has nothing to convert.
        del values["quantization_config"]
        config = cls.config_class.from_dict(values)
        if attention in ATTENTIONS:
            config._attn_implementation = attention
        # Buffers are real, because those that no checkpoint holds (rotary frequencies) are computed here.
        # no_grad keeps autograd from recording the moves to meta.
        with torch.no_grad(), init_empty_weights(include_buffers=False):
            return cls(config)  # type: ignore[no-any-return]
    except Exception as error:
        # Each model reads its configuration in its own way and may raise anything.
        reason = " ".join(str(error).split()) or type(error).__name__
        raise SmoothQuantError(
            f"config.json does not make a {cls.__name__} ({reason[:200]}): install the release of transformers that it "
            "was made with."
        ) from error


def plain_floats(value: Any) -> Any:
    """Returns parsed JSON with infinity and NaN as floats. transformers 5 writes {"__float__": "Infinity"} for them."""
    if isinstance(value, dict):
        if value.keys() == {_FLOAT_TAG} and str(value[_FLOAT_TAG]) in _FLOATS:
            return _FLOATS[str(value[_FLOAT_TAG])]
        return {k: plain_floats(v) for k, v in value.items()}
    return [plain_floats(v) for v in value] if isinstance(value, list) else value


def _without_code(value: Any) -> Any:
    """Returns the configuration without the keys that can name code to fetch."""
    if isinstance(value, dict):
        return {k: _without_code(v) for k, v in value.items() if k not in _CODE_KEYS}
    return [_without_code(v) for v in value] if isinstance(value, list) else value


# --- replaced modules -------------------------------------------------------------------------------------------------


def layer_state(model: nn.Module, prefix: str = "") -> dict[str, Any]:
    """The state dict without the markers of quantized layers. A manifest holds the same information."""
    state: dict[str, Any] = model.state_dict(prefix=prefix)
    for name, module in model.named_modules(remove_duplicate=False):
        if (kind := kinds.kind_of(module)) is not None:
            for marker in kind.markers:
                state.pop(f"{prefix}{name}.{marker}" if name else f"{prefix}{marker}", None)
    return state


def describe_modules(model: nn.Module) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Returns the constructor arguments of each replaced module, and the other names of those with several.

    Raises:
        SmoothQuantError: a module is a part of a layer whose other parts are in other processes.
    """
    modules: dict[str, dict[str, Any]] = {}
    shared: dict[str, str] = {}
    first: dict[nn.Module, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if (kind := kinds.kind_of(module)) is None:
            continue
        if part := kind.part(module):
            raise SmoothQuantError(
                f"{name} is sharded over processes ({part}), and a checkpoint holds whole layers: save the model "
                "before it is sharded."
            )
        if first.setdefault(module, name) != name:
            shared[name] = first[module]
            continue
        modules[name] = kinds.describe(module)
    return modules, shared


def make_module(name: str, arguments: Mapping[str, Any]) -> nn.Module:
    """Makes a replaced module on the meta device.

    Raises:
        SmoothQuantError: `describe_modules` does not return such arguments.
    """
    if (made := kinds.make(arguments)) is None:
        raise SmoothQuantError(f"the arguments of {name} are not understood: {dict(arguments)}.")
    return made


def make_modules(
    modules: Mapping[str, Mapping[str, Any]], shared: Mapping[str, str]
) -> dict[str, nn.Module]:
    """Makes the modules that `describe_modules` described and returns them under each of their names."""
    made = {name: make_module(name, values) for name, values in modules.items()}
    return made | {alias: made[name] for alias, name in shared.items()}


def module_mismatches(model: nn.Module, modules: Mapping[str, nn.Module]) -> Iterator[str]:
    """Yields phrases that say why the replaced modules do not fit the model."""
    existing = dict(model.named_modules(remove_duplicate=False))
    for name, new in modules.items():
        old = existing.get(name)
        if old is None:
            yield f"it has no module {name}"
            continue
        kind = kinds.kind_of(new)
        if kind is not None and not kind.is_linear:
            if (problem := kind.mismatch(new, old)) is not None:
                yield f"{name} {problem}"
        elif not is_float_linear(old) and not kinds.is_quantized_linear(old):
            yield f"{name} is a {type(old).__name__}"
        elif (sizes := _sizes(old)) != _sizes(new):
            yield f"{name} maps {sizes[0]} to {sizes[1]} features, not {_sizes(new)}"
        elif (getattr(old, "bias", None) is None) != (new.bias is None):
            yield f"{name} has {'no' if new.bias is not None else 'a'} bias"


def mismatches(
    model: nn.Module, modules: Mapping[str, nn.Module], manifest: Manifest
) -> Iterator[str]:
    """Yields phrases that say why the checkpoint does not fit the model. Changes nothing."""
    expected = model.state_dict(keep_vars=True)
    existing = dict(model.named_modules(remove_duplicate=False))
    yield from module_mismatches(model, modules)
    for name, new in modules.items():
        for key in [k for k in expected if k.startswith(f"{name}.")]:
            del expected[key]
        expected.update({f"{name}.{k}": t for k, t in new.state_dict(keep_vars=True).items()})
    kept = set(expected)
    stored = {**manifest.tensors, **{a: manifest.tensors[n] for a, n in manifest.tied.items()}}
    for name in manifest.non_persistent:
        owner, _, leaf = name.rpartition(".")
        if owner not in existing or leaf not in existing[owner]._buffers or name in expected:
            yield f"it has no buffer {name} outside its state dict"
        del stored[name]
    for name, buffer in model.named_buffers(remove_duplicate=False):
        # It is not in the state dict, so nothing will give it a value.
        if buffer.is_meta and name not in kept and name not in manifest.non_persistent:
            yield f"its buffer {name} has no data (meta device)"
    for name, entry in stored.items():
        want = expected.pop(name, None)
        if not isinstance(want, Tensor):
            yield f"it has no tensor {name}"
        elif list(want.shape) != entry["shape"]:
            yield f"{name} has shape {list(want.shape)}, not {entry['shape']}"
        elif not _same_kind(want, entry["dtype"], exact=name.rpartition(".")[0] in modules):
            yield f"{name} is {want.dtype}, not {entry['dtype']}"
    for name in expected:
        yield f"{name} is not in the checkpoint"


def _sizes(module: nn.Module) -> tuple[int, int]:
    if kinds.is_quantized(module):
        shown = kinds.shown(module)
        return shown["in_features"], shown["out_features"]
    n, k = weight_of(module).shape
    return k, n


def float_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor, bool]]:
    """The float tensors outside quantized layers, under all of their names, and whether the state dict has them."""
    for prefix, module in model.named_modules(remove_duplicate=False):
        if kinds.is_quantized(module):
            continue
        for name, t in (*module._parameters.items(), *module._buffers.items()):
            if t is not None and t.is_floating_point():
                full = f"{prefix}.{name}" if prefix else name
                yield full, t, name not in module._non_persistent_buffers_set


def float_dtype(name: object) -> torch.dtype | None:
    """The floating-point type of this name; None if there is none."""
    found = getattr(torch, name, None) if isinstance(name, str) else None
    return found if isinstance(found, torch.dtype) and found.is_floating_point else None


def _same_kind(want: Tensor, dtype: str, *, exact: bool) -> bool:
    """Whether the types match. Outside quantized layers, the checkpoint decides between float types."""
    stored = getattr(torch, dtype, None)
    if not isinstance(stored, torch.dtype):
        return False
    if exact:
        return stored == want.dtype
    return stored == want.dtype or (stored.is_floating_point and want.is_floating_point())


def install(model: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    """Puts the replaced modules into the model."""
    for name, new in modules.items():
        replace_module(model, name, new.train(model.training))
    for module, attribute, ties in keep_heads_apart(model):
        setattr(module, attribute, ties)


def check_scales(tensors: Mapping[str, Tensor], modules: Mapping[str, Mapping[str, Any]]) -> None:
    """Raises SmoothQuantError unless every scale and factor is positive and finite, or 0 for a weight's channel.

    Other tensors are checked by their kind, too.
    """
    scales = {
        f"{name}.{scale}": scale in kind.weight_scales
        for name, arguments in modules.items()
        if (kind := kinds.named(arguments["class"])) is not None
        for scale in kind.scales
    }
    for name, of_weight in scales.items():
        t = tensors.get(name)
        if t is not None and not bool(((t >= 0 if of_weight else t > 0) & t.isfinite()).all()):
            wrong = "negative" if of_weight else "not positive"
            raise SmoothQuantError(
                f"{name} has a value that is NaN, infinite or {wrong}: quantize the model again."
            )
    own: dict[str, dict[str, Tensor]] = {name: {} for name in modules}
    for full, t in tensors.items():
        name, _, leaf = full.rpartition(".")
        if name in own:
            own[name][leaf] = t
    for name, arguments in modules.items():
        kind = kinds.named(arguments["class"])
        if kind is not None and (problem := kind.problem(own[name], arguments)) is not None:
            raise SmoothQuantError(f"{name}.{problem}: quantize the model again.")
