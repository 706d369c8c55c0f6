"""Makes `from_pretrained` of transformers load our checkpoints and `save_pretrained` refuse quantized models."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

from smoothquant_kernels.checkpoint.skeleton import QUANT_METHOD
from smoothquant_kernels.errors import SmoothQuantError
from smoothquant_kernels.nn.kinds import is_quantized

HF_QUANTIZER = "hf_quantizer"
_done = False


def register_transformers(*, compressed_tensors: bool = False) -> None:
    """Lets `AutoModelForCausalLM.from_pretrained(folder)` load what `save_quantized` wrote, in this process.

    The result is that of `load_quantized`, bit for bit. The checkpoint decides the types (`dtype` is not used). It also
    decides how attention runs, unless the caller does. Without this call, transformers reports that it finds no
    weights in such a folder. A second call does nothing more.

    Args:
        compressed_tensors: also keep the int8 layers of W8A8 checkpoints of llm-compressor, which transformers would
            turn to float at the first forward pass. Other checkpoints of compressed-tensors load as before. The package
            compressed-tensors is not needed.

    Raises:
        SmoothQuantError: the installed transformers has no such hook. Later, `from_pretrained` raises what
            `load_quantized` raises. It also raises if the model would go to several devices.

    Equivalent to:
        AutoModelForCausalLM.from_pretrained = load_quantized, for folders whose config.json names our method

    Source: Hugging Face transformers, `register_quantizer`.
    """
    global _done
    if compressed_tensors:
        from smoothquant_kernels.checkpoint.compressed_tensors.hook import register

        register()
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
    """Each module whose `save_pretrained` would write quantized layers, with an `hf_quantizer` that makes it refuse.

    transformers and diffusers check that attribute. Any other saver writes the state dict, which no float model
    loads (`W8A8Linear`). The list is empty if transformers, which defines the attribute's class, is not imported.
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
