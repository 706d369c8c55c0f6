"""Folders that another tool has quantized: the method that config.json names, and what to do with each."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

from smoothquant_kernels.checkpoint.compressed_tensors.scheme import (
    QUANT_METHOD as _COMPRESSED_TENSORS,
)
from smoothquant_kernels.checkpoint.manifest import is_checkpoint, read_config
from smoothquant_kernels.checkpoint.skeleton import QUANT_METHOD
from smoothquant_kernels.errors import SmoothQuantError

_AS_FLOAT = "quantize the original float model with this package"
#: `quant_method` -> the tool and what to do instead of `load_quantized`.
_INSTEAD = {
    "aqlm": ("AQLM", "load it with transformers and aqlm"),
    "auto-round": ("AutoRound", "load it with transformers and auto-round"),
    "awq": ("AWQ (4-bit weights, float activations)", "load it with transformers and gptqmodel"),
    "bitsandbytes": (
        "bitsandbytes, whose LLM.int8 computes outlier channels in float16 and whose 4-bit weights are no int8",
        "load it with transformers and bitsandbytes",
    ),
    "compression_config": (
        "an early release of compressed-tensors, before quantization_config",
        "save it again with a newer llm-compressor",
    ),
    "eetq": ("EETQ (int8 weights, float activations)", "load it with transformers and eetq"),
    "fbgemm_fp8": ("FBGEMM in FP8", "load it with transformers"),
    "fp8": ("FP8 with a scale for each block", "load it with transformers"),
    "gptq": ("GPTQ (weights alone)", "load it with transformers and gptqmodel"),
    "hqq": ("HQQ (weights alone)", "load it with transformers and hqq"),
    "modelopt": ("NVIDIA Model Optimizer", "load it with TensorRT-LLM or vLLM"),
    "mxfp4": ("MXFP4", "load it with transformers"),
    "quanto": ("optimum-quanto", "load it with transformers and optimum-quanto"),
    "quark": ("AMD Quark", "load it with transformers and amd-quark"),
    "torchao": (
        "torchao, whose files hold its own tensor classes",
        "load it with transformers and torchao",
    ),
}


def quant_method(folder: Path) -> str | None:
    """The method of another tool that quantized the model of a folder, by its config.json; None if it names none."""
    try:
        _, values = read_config(folder)
    except SmoothQuantError:
        return None
    found = values.get("quantization_config")
    if not isinstance(found, Mapping):
        return "compression_config" if values.get("compression_config") else None
    if found.get("load_in_8bit") or found.get("load_in_4bit"):
        return "bitsandbytes"
    method = str(found.get("quant_method") or found.get("quant_algo") or "another tool")
    return None if method == QUANT_METHOD else method


def is_compressed_tensors(folder: Path) -> bool:
    """Whether this is a folder in the format of compressed-tensors, which `load_quantized` reads or refuses."""
    return not is_checkpoint(folder) and quant_method(folder) == _COMPRESSED_TENSORS


def refuse(folder: Path, method: str) -> NoReturn:
    """Raises SmoothQuantError with what to do with a folder of this method."""
    tool, instead = _INSTEAD.get(method, (method, "load it with the tool that wrote it"))
    raise SmoothQuantError(
        f"{folder} is quantized by {tool}, whose layers are not those of this package: {instead}, or {_AS_FLOAT}."
    )
