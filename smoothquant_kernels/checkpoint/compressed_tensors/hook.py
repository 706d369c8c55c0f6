"""Makes `from_pretrained` of transformers keep the int8 layers of llm-compressor's W8A8 checkpoints.

transformers' own quantizer for compressed-tensors turns every weight to float at the first forward pass. This module
imports transformers, so import it late.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, cast

from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils.hub import cached_file
from transformers.utils.quantization_config import QuantizationConfigMixin

from smoothquant_kernels.checkpoint import skeleton as skeletons
from smoothquant_kernels.checkpoint.compressed_tensors.load import Plan, fill
from smoothquant_kernels.checkpoint.compressed_tensors.scheme import (
    QUANT_METHOD,
    WEIGHT,
    is_w8a8,
    parse,
)
from smoothquant_kernels.checkpoint.compressed_tensors.weights import BUFFERS
from smoothquant_kernels.checkpoint.manifest import CONFIG, read_config
from smoothquant_kernels.errors import SmoothQuantError

_UNEXPECTED = "_keys_to_ignore_on_load_unexpected"
_MISSING = "_keys_to_ignore_on_load_missing"


class Int8Config(QuantizationConfigMixin):
    """The quantization_config of a W8A8 checkpoint, as config.json has it."""

    def __init__(self, **values: Any) -> None:
        self.values = {**values, "quant_method": QUANT_METHOD}
        self.quant_method = cast(Any, QUANT_METHOD)

    def to_dict(self) -> dict[str, Any]:
        """Returns what the constructor took."""
        return copy.deepcopy(self.values)


class Int8Quantizer(HfQuantizer):
    """Loads int8 layers for `from_pretrained`; transformers loads the rest of the model.

    The layers are installed before transformers looks for weights and get their tensors afterwards, because
    transformers would convert the scales to the type of the model.
    """

    requires_calibration = True  # refuses quantization_config=... on a float model
    is_compileable = property(lambda _: True)
    is_trainable = property(lambda _: False)
    plan: Plan
    patterns: dict[str, Any]

    def validate_environment(self, *_: Any, **__: Any) -> None:
        """Refuses, before the weights are downloaded, what the int8 layers do not compute."""
        parse(self.quantization_config.to_dict())

    def is_serializable(self, safe_serialization: Any = None) -> bool:
        """Returns False. It is not asked: a loaded model has the quantizer of our own format, which saves it."""
        return False

    def update_device_map(self, device_map: Any) -> Any:
        _check_one_device(device_map)
        return device_map

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        folder = _folder(model, kwargs.get("checkpoint_files"))
        if (made := read_config(folder)[1].get("architectures")) != [type(model).__name__]:
            raise SmoothQuantError(
                f"{folder} holds a {made} and a {type(model).__name__} was asked for: use the class of the checkpoint."
            )
        self.plan = Plan.of(folder, model, floats_follow=True)
        skeletons.install(model, skeletons.make_modules(self.plan.modules, {}))
        # The plan has compared all names with the files, and these would be reported as missing or unexpected.
        # transformers 5 reads these attributes of the instance, transformers 4 calls the methods below.
        self.patterns = {name: model.__dict__.get(name) for name in (_UNEXPECTED, _MISSING)}
        setattr(model, _UNEXPECTED, {".*"})
        setattr(model, _MISSING, {rf"\.({'|'.join(BUFFERS.values())})$"})

    def update_expected_keys(
        self, model: Any, expected_keys: list[str], loaded_keys: list[str]
    ) -> list[str]:
        """Leaves out the int8 weights, whose names in the files are those of float weights (transformers 4)."""
        own = {f"{layer}.{WEIGHT}" for layer in self.plan.layers}
        return [key for key in expected_keys if key not in own]

    def update_unexpected_keys(
        self, model: Any, unexpected_keys: list[str], prefix: str
    ) -> list[str]:
        """Returns none: the plan has compared all names with the files."""
        return []

    def update_missing_keys_after_loading(
        self, model: Any, missing_keys: list[str], prefix: str
    ) -> list[str]:
        """Returns none, likewise."""
        return []

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        _check_one_device(getattr(model, "hf_device_map", None))
        fill(self.plan, model)
        for name, patterns in self.patterns.items():
            if patterns is None:
                delattr(model, name)
            else:
                setattr(model, name, patterns)
        return model


def _check_one_device(device_map: Any) -> None:
    devices = set(device_map.values()) if isinstance(device_map, dict) else set()
    if len(devices) > 1 or devices & {"disk"}:
        raise SmoothQuantError(
            f"device_map={device_map!r} would spread the model: name one device, or use load_quantized."
        )


def _folder(model: Any, files: list[str] | None) -> Path:
    """The folder of the checkpoint, also in the cache of the hub. transformers 4 does not pass the files."""
    if files:
        return Path(files[0]).parent
    name = model.config._name_or_path
    return Path(str(cached_file(name, CONFIG, local_files_only=True))).parent


def register() -> None:
    """Replaces transformers' quantizer for compressed-tensors where `is_w8a8`; a second call does nothing."""
    configs: dict[str, Any] = auto.AUTO_QUANTIZATION_CONFIG_MAPPING
    quantizers: dict[str, Any] = auto.AUTO_QUANTIZER_MAPPING
    own_config, own_quantizer = configs[QUANT_METHOD], quantizers[QUANT_METHOD]
    if getattr(own_config, "of_smoothquant_kernels", False):
        return

    class EitherConfig(own_config):  # type: ignore[misc, valid-type]
        """transformers' own class, except that `from_dict` also makes an `Int8Config`."""

        of_smoothquant_kernels = True

        @classmethod
        def from_dict(cls, config_dict: Any, *args: Any, **kwargs: Any) -> Any:
            own = Int8Config if is_w8a8(config_dict) else own_config
            return own.from_dict(config_dict, *args, **kwargs)

    def either_quantizer(quantization_config: Any, **kwargs: Any) -> HfQuantizer:
        int8 = isinstance(quantization_config, Int8Config)
        made: HfQuantizer = (Int8Quantizer if int8 else own_quantizer)(
            quantization_config, **kwargs
        )
        return made

    configs[QUANT_METHOD] = EitherConfig
    quantizers[QUANT_METHOD] = either_quantizer
