"""The classes by which transformers recognizes a quantized model: `config.quantization_config`, `model.hf_quantizer`.

This module imports transformers, so import it late.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, cast

from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from smoothquant_kernels.checkpoint import skeleton as skeletons
from smoothquant_kernels.checkpoint import tensor_parallel
from smoothquant_kernels.checkpoint.load import load_quantized
from smoothquant_kernels.checkpoint.manifest import INDEX, Manifest, read_manifest
from smoothquant_kernels.errors import SmoothQuantError

_SPREAD = {"auto", "balanced", "balanced_low_0", "sequential", "disk"}


class Config(QuantizationConfigMixin):
    """The quantization_config in config.json. It holds only the method, and the manifest has the rest."""

    def __init__(self, **_: Any) -> None:
        self.quant_method = cast(Any, skeletons.QUANT_METHOD)


class Quantizer(HfQuantizer):
    """Loads a checkpoint for `from_pretrained`. Refuses `save_pretrained`, whose files could not be read again.

    Installs the modules before transformers looks for weights, and reads the tensors afterwards.
    """

    requires_calibration = True  # refuses quantization_config=... on a float model
    is_compileable = property(lambda _: True)
    is_trainable = property(lambda _: False)

    def is_serializable(self, safe_serialization: Any = None) -> bool:
        """Returns False after a warning, because the error that transformers then raises refers to warnings."""
        warnings.warn(
            "save_pretrained, and with it push_to_hub and Trainer.save_model, cannot write int8 layers so that "
            "from_pretrained finds them: use smoothquant_kernels.save_quantized(model, folder), or save the float "
            "model before quantize_model.",
            stacklevel=3,
        )
        return False

    def update_device_map(self, device_map: Any) -> Any:
        devices = set(device_map.values()) if isinstance(device_map, dict) else {device_map}
        if len(devices) > 1 or devices & _SPREAD:
            raise SmoothQuantError(
                f"device_map={device_map!r} would spread the model: name one device, or use load_quantized."
            )
        return device_map

    def update_attn_implementation(self, config: Any) -> Any:
        """Sets the weight file and the attention in the only hook that sees the configuration before weight lookup."""
        manifest = read_manifest(Path(config._name_or_path))
        # config.json must not hold it, or a transformers without our method would continue with random weights.
        config.transformers_weights = _weights_file(manifest)
        attention = manifest.model["attention"]
        if attention in skeletons.ATTENTIONS and not config._attn_implementation_internal:
            config._attn_implementation = attention
        return config

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        self.folder = Path(kwargs["checkpoint_files"][0]).parent
        manifest = read_manifest(self.folder)
        if type(model).__name__ != manifest.model["name"]:
            raise SmoothQuantError(
                f"{self.folder} holds a {manifest.model['name']} and a {type(model).__name__} was asked for: use "
                "the class of the checkpoint."
            )
        skeletons.install(model, skeletons.make_modules(manifest.modules, manifest.shared_modules))

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        # transformers has converted the types of what it read. This reads the tensors again, exactly.
        spread = tensor_parallel.float_placements(model)
        load_quantized(self.folder, device=model.device, model=model)
        tensor_parallel.finish(model, spread)
        del model.config.transformers_weights
        model.config.dtype = model.dtype  # replaces the caller's `dtype`
        return model


def _weights_file(manifest: Manifest) -> str:
    files = {entry["file"] for entry in manifest.tensors.values()}
    if len(files) == 1:
        return files.pop()
    if INDEX not in manifest.files:
        raise SmoothQuantError(
            f"from_pretrained needs {INDEX} for the {len(files)} weight files of this checkpoint, which an earlier "
            "release wrote without: use load_quantized, or save it again."
        )
    return INDEX
