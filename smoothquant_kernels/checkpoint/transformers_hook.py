"""Makes `from_pretrained` and `save_pretrained` of transformers load and save quantized models."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

from smoothquant_kernels.checkpoint.skeleton import QUANT_METHOD
from smoothquant_kernels.nn.kinds import is_quantized

_done = False


def register_transformers(*, compressed_tensors: bool = False) -> None:
    """Lets `from_pretrained` of transformers load quantized models, in this process.

    It loads what `save_quantized` wrote, with the result of `load_quantized`, and what `save_pretrained` of a quantized
    model wrote. Any class of transformers will do, `device_map` may name several devices, and `dtype` converts the
    float tensors: without it, or with the checkpoint's own, every tensor keeps its type. The scales of int8 layers stay
    float32. Attention runs as in the saved model unless the caller passes `attn_implementation`, of which there is one
    more, ``"int8_kv"``: see `use_int8_attention`. Without this call, transformers refuses both kinds of folders. A
    second call does nothing more.

    Args:
        compressed_tensors: also keep the int8 layers of W8A8 checkpoints of llm-compressor, which transformers would
            turn to float at the first forward pass. Other checkpoints of compressed-tensors load as before. The package
            compressed-tensors is not needed.

    Raises:
        SmoothQuantError: the installed transformers has no such hook. Later, `from_pretrained` raises what
            `load_quantized` raises. It also raises if the files lack a tensor of an int8 layer.

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
    from transformers.quantizers.auto import register_quantization_config, register_quantizer

    from smoothquant_kernels.checkpoint.hf_config import Config
    from smoothquant_kernels.checkpoint.hf_quantizer import Quantizer, name_weights_early
    from smoothquant_kernels.kv_cache.attention import register_attention

    register_quantization_config(QUANT_METHOD)(Config)
    register_quantizer(QUANT_METHOD)(Quantizer)
    name_weights_early()
    register_attention()
    _done = True


def quantizers(model: nn.Module) -> list[tuple[Any, str, Any]]:
    """The attributes with which transformers recognizes a quantized model, as (object, name, value).

    They go to each module whose `save_pretrained` would write quantized layers. It works for a whole model of
    transformers. For its parts and for the models of other libraries, which check the same attribute, it refuses. Any
    other saver writes the state dict, which no float model loads (`W8A8Linear`). The list is empty if transformers,
    which defines the classes of the values, is not imported.
    """
    if "transformers" not in sys.modules:
        return []
    savers = [
        module
        for module in model.modules()
        if hasattr(type(module), "save_pretrained")
        and any(is_quantized(m) for m in module.modules())
    ]
    if not savers:
        return []
    from smoothquant_kernels.checkpoint.hf_config import Config
    from smoothquant_kernels.checkpoint.hf_quantizer import Quantizer

    whole = _whole_models(model)
    found: list[tuple[Any, str, Any]] = []
    for module in savers:
        config, refusal = Config(), _refusal(module, whole)
        if refusal is None:
            config = Config.of(module)
            found.append((module.config, "quantization_config", config))
        found.append((module, "hf_quantizer", Quantizer(config, refusal=refusal)))
    return found


def _whole_models(model: nn.Module) -> list[Any]:
    """The models of transformers that are not a part of another one."""
    from transformers import PreTrainedModel

    found: list[Any] = []
    parts: set[nn.Module] = set()
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and module not in parts:
            found.append(module)
            parts.update(module.modules())
    return found


def _refusal(module: nn.Module, whole: list[Any]) -> str | None:
    """Why `save_pretrained` of a module with quantized layers cannot work; None if it can."""
    ours = "use smoothquant_kernels.save_quantized(model, folder)"
    if module not in whole:
        return (
            f"save_pretrained of a {type(module).__name__} cannot write int8 layers so that from_pretrained finds "
            f"them, because it is not a whole model of transformers: call that of the whole model, or {ours}."
        )
    if sum(other.config is module.config for other in whole) > 1:
        return (
            f"save_pretrained of this {type(module).__name__} would describe int8 layers in a configuration that it "
            f"shares with another model: set model.config = copy.deepcopy(model.config) before quantizing, or {ours}."
        )
    return None
