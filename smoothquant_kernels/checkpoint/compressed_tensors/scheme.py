"""The `quantization_config` of compressed-tensors: which layers are int8, and with which scales."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from smoothquant_kernels.errors import SmoothQuantError
from smoothquant_kernels.modeling.view import is_read_by_others
from smoothquant_kernels.nn.float_linear import is_conv1d

QUANT_METHOD = "compressed-tensors"
#: The format of int8 weights with int8 activations.
FORMAT = "int-quantized"
#: The states of a model. The tensors decide whether its weights are int8: others wrote int8 weights as "frozen", too.
COMPRESSED = "compressed"
STATES = ("initialized", "calibration", "frozen", COMPRESSED, "decompressed")
#: The ends of the names of a layer's tensors.
WEIGHT, WEIGHT_SCALE, INPUT_SCALE = "weight", "weight_scale", "input_scale"
#: Other releases write these for symmetric layers as well, as zeros.
ZERO_POINTS = ("weight_zero_point", "input_zero_point")

#: The formats in which an int8 weight is a plain tensor. Older releases did not write the format of int8 weights.
_PLAIN = (None, FORMAT, "naive-quantized", "dense", "fakequant")
#: How a pattern among names begins.
REGEX = "re:"
_GROUP_KEYS = {"targets", "weights", "input_activations", "output_activations", "format"}
_DEFAULTS: dict[str, Any] = {
    "num_bits": 8,
    "type": "int",
    "symmetric": True,
    "group_size": None,
    "strategy": None,
    "block_structure": None,
    "dynamic": False,
    "actorder": None,
    "scale_dtype": None,
    "zp_dtype": None,
    "observer": None,
    "observer_kwargs": {},
}
_FLOAT = "quantize the original float model with this package"
_OTHERS = "load it with transformers and compressed-tensors"


@dataclass(frozen=True)
class Scheme:
    """How a layer is quantized, in the words of `SmoothQuantConfig`."""

    activation_scheme: str
    weight_granularity: str


@dataclass(frozen=True)
class Quantization:
    """What a `quantization_config` says.

    Attributes:
        targets: names, ``re:`` patterns or classes of modules -> the scheme of the layers that they match.
        ignore: the same, for layers that stay in float.
        state: one of `STATES`.
        version: the release of compressed-tensors that wrote it; empty if it does not say.
    """

    targets: Mapping[str, Scheme]
    ignore: tuple[str, ...] = ()
    state: str = COMPRESSED
    version: str = ""

    def layers(self, model: nn.Module) -> dict[str, Scheme]:
        """The scheme of each linear of a model that is int8.

        As in compressed-tensors, a name counts before a pattern and a pattern before a class.

        Raises:
            SmoothQuantError: a target matches no layer, or something that is not an `nn.Linear`, or none is int8.
        """
        found: dict[str, Scheme] = {}
        unmatched = set(self.targets)
        for name, module in model.named_modules():
            matched = _matching(name, module, self.targets)
            if not matched:
                continue
            if _matching(name, module, self.ignore):
                unmatched -= set(matched)
            elif is_plain_linear(module):
                unmatched -= set(matched)
                found[name] = self.targets[matched[0]]
            elif not _may_pass(module, matched):
                raise SmoothQuantError(
                    f"the target {matched[0]!r} makes {name or 'the model'} int8, which is a {type(module).__name__} "
                    f"and not an nn.Linear: {_FLOAT}."
                )
        if unmatched:
            raise SmoothQuantError(
                f"the target {min(unmatched)!r} of the quantization_config matches no linear layer of the "
                f"{type(model).__name__}: copy config.json again, or install the release of transformers that it was "
                "made with."
            )
        if not found:
            raise SmoothQuantError(
                f"the quantization_config makes no layer of the {type(model).__name__} int8, because it ignores all "
                f"that it targets: copy config.json again, or {_FLOAT}."
            )
        return found


def _matching(name: str, module: nn.Module, patterns: Any) -> list[str]:
    """The patterns that match a module, in the order in which they decide."""
    by_name = [p for p in sorted(patterns, key=lambda p: (REGEX in p, p)) if _matches(name, p)]
    classes = {cls.__name__ for cls in type(module).__mro__ if issubclass(cls, nn.Module)}
    return by_name + [p for p in sorted(patterns) if p in classes and p not in by_name]


def _matches(name: str, pattern: str) -> bool:
    if not pattern.startswith(REGEX):
        return pattern == name
    return re.match(pattern.removeprefix(REGEX), name) is not None


def is_plain_linear(module: nn.Module) -> bool:
    """Whether a module computes what an `nn.Linear` does, and nothing else reads its weight."""
    plain = isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward
    return plain and not is_read_by_others(module)


def _may_pass(module: nn.Module, matched: list[str]) -> bool:
    """Whether a target may match this module without effect: a pattern for names often matches blocks of layers too."""
    holds_weight = isinstance(module, (nn.Linear, nn.Embedding)) or is_conv1d(module)
    return not holds_weight and all(pattern.startswith(REGEX) for pattern in matched)


def is_w8a8(values: object) -> bool:
    """Whether a `quantization_config` says int8 weights and int8 activations for all groups, and no sparsity.

    What `parse` refuses may be among them (asymmetric activations, for example).
    """
    groups = _get(values, "config_groups")
    if not isinstance(groups, Mapping) or not groups or _get(values, "sparsity_config"):
        return False

    def int8(group: object, key: str) -> bool:
        given = _get(group, key)
        if not isinstance(given, Mapping):
            return False
        return {**_DEFAULTS, **given}["num_bits"] == 8 and _type(given) == "int"

    return all(
        int8(group, "weights") and int8(group, "input_activations") for group in groups.values()
    )


def parse(values: object) -> Quantization:
    """Reads the `quantization_config` of a checkpoint with int8 weights and activations.

    Raises:
        SmoothQuantError: it is malformed, or it describes something that the int8 layers here do not compute.
    """
    if not isinstance(values, Mapping) or values.get("quant_method") != QUANT_METHOD:
        raise SmoothQuantError(
            f"the quantization_config must be that of {QUANT_METHOD}; got {values!r:.200}."
        )
    for key, what in (
        ("kv_cache_scheme", "quantizes the key and value cache, which stays in float here"),
        ("sparsity_config", "stores sparse weights, which are not read here"),
        ("transform_config", "rotates activations by transforms of compressed-tensors"),
    ):
        if values.get(key):
            raise SmoothQuantError(
                f"the checkpoint has a {key}: it {what}; {_OTHERS}, or {_FLOAT}."
            )
    state = values.get("quantization_status", COMPRESSED)
    groups, ignore = values.get("config_groups"), values.get("ignore") or []
    if state not in STATES:
        raise _malformed("quantization_status", state, f"one of {', '.join(STATES)}")
    if not isinstance(groups, Mapping) or not groups:
        raise _malformed("config_groups", groups, "an object with at least one group")
    if not _are_patterns(ignore):
        raise _malformed("ignore", ignore, "a list of names, classes and valid re: patterns")
    targets: dict[str, Scheme] = {}
    for name, group in groups.items():
        targets |= dict.fromkeys(*_group(str(name), group))
    if (layout := values.get("format")) not in (*_PLAIN, "mixed-precision"):
        raise _packed("the checkpoint", layout)
    return Quantization(targets, tuple(ignore), state, str(values.get("version") or ""))


def _group(name: str, group: object) -> tuple[list[str], Scheme]:
    """The targets of a group, and their scheme."""
    if not isinstance(group, Mapping):
        raise _malformed(f"config_groups.{name}", group, "an object with targets and weights")
    if unknown := sorted(group.keys() - _GROUP_KEYS):
        raise _malformed(
            name, unknown, f"known entries, which are {', '.join(sorted(_GROUP_KEYS))}"
        )
    targets = group.get("targets")
    if not targets or not _are_patterns(targets):
        raise _malformed(f"{name}.targets", targets, "names, classes or valid re: patterns")
    weights = _arguments(f"{name}.weights", group.get("weights"))
    inputs = _arguments(f"{name}.input_activations", group.get("input_activations"))
    if weights is None:
        raise _refusal(name, "does not quantize weights")
    granularity = _granularity(name, weights)
    if inputs is None:
        raise _refusal(
            name, "quantizes weights alone (W8A16), and the layers here have int8 activations too"
        )
    if (layout := group.get("format")) not in _PLAIN:
        raise _packed(f"the group {name}", layout)
    if group.get("output_activations") is not None:
        raise _refusal(name, "quantizes the outputs of layers")
    return list(targets), Scheme(_activations(name, inputs), granularity)


def _granularity(name: str, weights: Mapping[str, Any]) -> str:
    strategy = _strategy(weights)
    _check_int8(name, "weights", weights)
    if strategy not in ("channel", "tensor"):
        raise _refusal(name, f"has weight scales by {strategy}, not by channel or tensor")
    if weights["symmetric"] is not True:
        raise _refusal(name, "has asymmetric weights (a zero point)")
    if weights["dynamic"] is not False:
        raise _refusal(name, "has dynamic weights")
    return str(strategy)


def _activations(name: str, inputs: Mapping[str, Any]) -> str:
    strategy, dynamic = _strategy(inputs), inputs["dynamic"]
    _check_int8(name, "activations", inputs)
    if inputs["symmetric"] is not True:
        # A zero point shifts the range: x / scale runs up to 255, where the kernels saturate at 127.
        raise _refusal(
            name, "has asymmetric activations (a zero point), and the kernels here are symmetric"
        )
    if strategy == "token" and dynamic is True:
        return "per_token"
    if strategy == "tensor" and type(dynamic) is bool:
        return "per_tensor" if dynamic else "static"
    kind = {"True": "dynamic", "False": "static"}.get(str(dynamic), dynamic)
    raise _refusal(name, f"has {kind} activation scales by {strategy}")


def _arguments(where: str, given: object) -> Mapping[str, Any] | None:
    if given is None:
        return None
    if not isinstance(given, Mapping):
        raise _malformed(where, given, "an object or null")
    if unknown := sorted(given.keys() - _DEFAULTS.keys()):
        raise _malformed(where, unknown, f"known entries, which are {', '.join(sorted(_DEFAULTS))}")
    return {**_DEFAULTS, **given}


def _strategy(arguments: Mapping[str, Any]) -> object:
    """The strategy, which compressed-tensors derives from the group size where none is given."""
    size = arguments["group_size"]
    if arguments["strategy"] is not None:
        return str(arguments["strategy"]).lower()
    return "tensor" if size is None else "channel" if size == -1 else "group"


def _type(arguments: Mapping[str, Any]) -> str:
    return str(arguments.get("type", _DEFAULTS["type"])).lower()


def _check_int8(name: str, what: str, arguments: Mapping[str, Any]) -> None:
    bits, kind = arguments["num_bits"], _type(arguments)
    if kind != "int" or bits != 8 or type(bits) is not int:
        raise _refusal(name, f"has {what} of {bits} bits (type {kind}), not int8")


def _refusal(group: str, what: str) -> SmoothQuantError:
    return SmoothQuantError(
        f"the group {group} of the quantization_config {what}: {_OTHERS}, or {_FLOAT}."
    )


def _packed(what: str, layout: object) -> SmoothQuantError:
    return SmoothQuantError(
        f"{what} has the format {layout!r}, and int8 weights are read from {FORMAT!r}: {_OTHERS}, or {_FLOAT}."
    )


def _malformed(where: str, value: object, allowed: str) -> SmoothQuantError:
    return SmoothQuantError(
        f"{where} of the quantization_config must be {allowed}; got {value!r:.200}: copy config.json again."
    )


def _are_patterns(value: object) -> bool:
    return isinstance(value, (list, tuple)) and all(map(_is_pattern, value))


def _is_pattern(value: object) -> bool:
    try:
        return isinstance(value, str) and bool(re.compile(value.removeprefix(REGEX)) or True)
    except (re.error, OverflowError, RecursionError):
        return not str(value).startswith(REGEX)


def _get(values: object, key: str) -> Any:
    return values.get(key) if isinstance(values, Mapping) else None
