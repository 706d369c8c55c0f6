"""`from_pretrained` of transformers on our checkpoints, and its `save_pretrained` on quantized models."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

from smoothquant_kernels.checkpoint.skeleton import QUANT_METHOD
from smoothquant_kernels.errors import SmoothQuantError
from smoothquant_kernels.nn.kinds import is_quantized

HF_QUANTIZER = "hf_quantizer"
_done = False


def register_transformers() -> None:
    """Lets `AutoModelForCausalLM.from_pretrained(folder)` load what `save_quantized` wrote, for this process.

    The result is that of `load_quantized`, bit for bit: the checkpoint decides the types (`dtype` is not used) and,
    unless the caller does, how attention runs. Without this call transformers finds no weights in such a folder and
    says so. A second call does nothing.

    Raises:
        SmoothQuantError: the installed transformers has no such hook. Later, from `from_pretrained`: what
            `load_quantized` raises, or the model shall go to several devices.

    Equivalent to:
        AutoModelForCausalLM.from_pretrained = load_quantized, for folders whose config.json names our method

    Source: Hugging Face transformers, `register_quantizer`.
    """
    global _done
    if _done:
        return
    import transformers
    from transformers.quantizers.auto import register_quantization_config, register_quantizer
    from transformers.quantizers.base import HfQuantizer

    if not hasattr(HfQuantizer, "update_attn_implementation"):
        raise SmoothQuantError(
            f"transformers {transformers.__version__} cannot load other formats by from_pretrained: upgrade it, or use "
            "load_quantized."
        )
    from smoothquant_kernels.checkpoint.hf_quantizer import Config, Quantizer

    register_quantization_config(QUANT_METHOD)(Config)
    register_quantizer(QUANT_METHOD)(Quantizer)
    _done = True


def save_refusals(model: nn.Module) -> list[tuple[nn.Module, Any]]:
    """Each module whose `save_pretrained` would write quantized layers, and the `hf_quantizer` that makes it refuse.

    transformers and diffusers ask for that attribute. Any other saver writes the state dict, which no float model
    loads (`W8A8Linear`). Nothing without transformers, which defines what it is.
    """
    if "transformers" not in sys.modules:
        return []
    from smoothquant_kernels.checkpoint.hf_quantizer import Config, Quantizer

    return [
        (module, Quantizer(Config()))
        for module in model.modules()
        if hasattr(type(module), "save_pretrained")
        and any(is_quantized(m) for m in module.modules())
    ]
