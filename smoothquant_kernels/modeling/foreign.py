"""Recognizes models that another tool has quantized by what their layers hold, and names the tool."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from smoothquant_kernels.errors import SmoothQuantError

_OURS = "smoothquant_kernels"
# Each key starts the module name of a layer's or a tensor's class. None of these packages is imported.
_PACKAGES = {
    "aqlm": "AQLM",
    "auto_gptq": "GPTQ",
    "auto_round": "AutoRound",
    "awq": "AWQ",
    "bitsandbytes": "bitsandbytes",
    "compressed_tensors": "compressed-tensors",
    "eetq": "EETQ",
    "gptqmodel": "GPTQ",
    "hqq": "HQQ",
    "neural_compressor": "Intel Neural Compressor",
    "optimum.quanto": "optimum-quanto",
    "quanto": "optimum-quanto",
    "quark": "AMD Quark",
    "spqr_quant": "SpQR",
    "torch.ao.nn.quantized": "torch.ao",
    "torch.ao.nn.intrinsic.quantized": "torch.ao",
    "torchao": "torchao",
    "transformer_engine": "Transformer Engine",
    "vptq": "VPTQ",
}
# Modules of transformers for other tools' formats, by the file that defines them.
_INTEGRATIONS = {
    "aqlm": "AQLM",
    "awq": "AWQ",
    "bitnet": "BitNet",
    "bitsandbytes": "bitsandbytes",
    "eetq": "EETQ",
    "fbgemm_fp8": "FBGEMM FP8",
    "finegrained_fp8": "FP8 with a scale for each block",
    "fp_quant": "FP-Quant",
    "higgs": "HIGGS",
    "hqq": "HQQ",
    "metal_quantization": "Metal quantization",
    "mxfp4": "MXFP4",
    "quanto": "optimum-quanto",
    "sinq": "SINQ",
    "spqr": "SpQR",
    "vptq": "VPTQ",
}
# What layers keep beside or instead of a float weight -> the tool, if only one does so.
_STATE = {
    "SCB": "bitsandbytes",
    "W_q": "HQQ",
    "qweight": "",
    "qzeros": "",
    "weight_global_scale": "compressed-tensors",
    "weight_packed": "compressed-tensors",
    "weight_scale": "",
    "weight_scale_inv": "",
    "weight_zero_point": "",
}
_METHODS = {"bitsandbytes_4bit": "bitsandbytes", "bitsandbytes_8bit": "bitsandbytes"}
_METHODS |= {"quanto": "optimum-quanto", "gptq": "GPTQ", "awq": "AWQ", "hqq": "HQQ", "fp8": "FP8"}
_METHODS |= {"eetq": "EETQ", "mxfp4": "MXFP4"}


def check_float_model(model: nn.Module) -> None:
    """Raises SmoothQuantError, with the tool and the layer, if another tool has quantized a layer of the model.

    Only what the layers hold counts. A configuration that says "quantized" is not enough, because transformers keeps it
    on models that it has dequantized.
    """
    for name, module in model.named_modules():
        sign = _sign(module)
        if sign is None:
            continue
        tool, what = sign
        tool = tool or _method(getattr(model, "config", None)) or "another tool"
        raise SmoothQuantError(
            f"the model is quantized already by {tool} ({name or 'it'} is a {type(module).__name__} {what}): load the "
            "original float model."
        )


def check_float_config(config: Any, source: object) -> None:
    """Raises SmoothQuantError if config.json says that the weights are quantized, before they are loaded."""
    method = _method(config)
    if method == _OURS:
        raise SmoothQuantError(
            f"{source} is quantized already by this package: use load_quantized for what save_quantized wrote and "
            "from_pretrained after register_transformers() for what save_pretrained wrote, or give the original model."
        )
    if method is not None:
        raise SmoothQuantError(
            f"{source} is quantized already by {method}: give the original float model."
        )


def _method(config: Any) -> str | None:
    """The tool that a configuration, or that of a tower inside it, names, or None."""
    for values in _configs(config):
        found = _get(values, "quantization_config")
        if found is None:
            found = _get(values, "compression_config")
        if found is None:
            continue
        method = _get(found, "quant_method") or _get(found, "quant_library")
        method = str(getattr(method, "value", method) or "another tool")
        return _METHODS.get(method, method)
    return None


def _configs(config: Any) -> Iterator[Any]:
    if config is None:
        return
    yield config
    if not isinstance(config, Mapping) and not hasattr(config, "__dict__"):
        return
    values = config if isinstance(config, Mapping) else vars(config)
    for key, value in list(values.items()):
        if str(key).endswith("_config") and not str(key).startswith(("quantization", "compress")):
            yield from _configs(value) if isinstance(value, Mapping) or _is_config(value) else ()


def _is_config(value: Any) -> bool:
    return hasattr(value, "to_dict") and hasattr(value, "__dict__")


def _get(values: Any, key: str) -> Any:
    return values.get(key) if isinstance(values, Mapping) else getattr(values, key, None)


def _sign(module: nn.Module) -> tuple[str, str] | None:
    """The tool ("" if unknown) that has quantized a module and the evidence for it, or None for a float module."""
    home = type(module).__module__
    if home.split(".")[0] == _OURS:
        return None
    state = {**module._parameters, **module._buffers}
    own = {name: t for name, t in state.items() if isinstance(t, Tensor)}
    for name, t in own.items():
        if (tool := _tool_of(type(t))) is not None:
            return tool, f"whose {name} is a {type(t).__name__}"
    if (tool := _tool_of(type(module))) is not None and (own or not list(module.children())):
        return tool, f"of {home}"
    if getattr(module, "quantization_scheme", None) is not None and own:
        return "compressed-tensors", "with a quantization_scheme"
    if not _is_linear(module):
        return None
    weight = own.get("weight")
    if weight is not None and _is_plain_float(weight):
        return None  # a scale beside a float weight is the model's own
    if names := [name for name in _STATE if name in own]:
        return _STATE[names[0]], f"with a {names[0]}"
    if weight is not None and weight.dim() >= 2:
        return "", f"whose weight is {weight.dtype}"
    return None


def _tool_of(cls: type) -> str | None:
    for base in cls.__mro__:  # a subclass of such a class counts too
        home = base.__module__
        if home.startswith("transformers.integrations."):
            return _INTEGRATIONS.get(home.split(".")[2])
        for prefix, tool in _PACKAGES.items():
            if home == prefix or home.startswith(f"{prefix}."):
                return tool
    return None


def _is_linear(module: nn.Module) -> bool:
    """Whether a module is or replaces a linear layer, in whatever form."""
    return isinstance(module, nn.Linear) or any(
        "linear" in base.__name__.lower() or base.__name__ == "Conv1D"
        for base in type(module).__mro__
    )


def _is_plain_float(t: Tensor) -> bool:
    return (
        t.dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16) or t.is_complex()
    )
