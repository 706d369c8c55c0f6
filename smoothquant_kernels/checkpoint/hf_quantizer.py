"""`model.hf_quantizer` of a quantized transformers model: how `from_pretrained` and `save_pretrained` treat it.

This module imports transformers, so import it late.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
import transformers
from transformers.quantizers.base import HfQuantizer

from smoothquant_kernels.checkpoint import skeleton as skeletons
from smoothquant_kernels.checkpoint import tensor_parallel
from smoothquant_kernels.checkpoint.hf_config import Config
from smoothquant_kernels.checkpoint.hf_float import dequantized
from smoothquant_kernels.checkpoint.hf_loading import KNOWS_MISSING, Loading, weights_and_attention
from smoothquant_kernels.checkpoint.transformers_hook import quantizers
from smoothquant_kernels.errors import SmoothQuantError


class Quantizer(HfQuantizer):
    """Lets transformers save a quantized model and load it again, from its own files and from `save_quantized`'s.

    The modules are installed before transformers looks for weights, so that it reads their tensors like all others:
    from several files, to several devices. A folder of `save_quantized` is checked against its manifest.

    Args:
        quantization_config: what config.json says.
        refusal: why `save_pretrained` of this module is refused; None if it is not.
    """

    requires_calibration = True  # refuses quantization_config=... on a float model
    is_compileable = property(lambda _: True)
    #: Adapters, prompts and float layers: gradients pass through the int8 layers, which stay as they are.
    is_trainable = property(lambda _: True)

    def __init__(
        self, quantization_config: Config, *, refusal: str | None = None, **options: Any
    ) -> None:
        super().__init__(quantization_config, **options)
        self.quantization_config: Config = quantization_config
        self.refusal = refusal
        self._loading: Loading | None = None

    # --- save_pretrained ----------------------------------------------------------------------------------------------

    def is_serializable(self, safe_serialization: Any = None) -> bool:
        """Whether the model can be saved. A warning says why not, to which the error of transformers refers."""
        reason = self.refusal
        if safe_serialization is False:
            reason = (
                "safe_serialization=False would write a pickle: leave it out to write safetensors."
            )
        if reason is not None:
            warnings.warn(reason, stacklevel=3)
        return reason is None

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Any], dict[str, str]]:
        """The tensors to write. Also describes the model's present layers in its configuration, written afterwards."""
        config = Config.of(model, complete=True)
        state = model.state_dict()
        if away := next((name for name, t in state.items() if t.is_meta), None):
            raise SmoothQuantError(
                f"{away} is offloaded and cannot be saved: load the model without offloading, for example with "
                'device_map="cpu".'
            )
        skeletons.check_scales(state, config.modules)
        inside = tuple(f"{alias}." for alias in config.shared_modules)
        self.quantization_config = model.config.quantization_config = config
        return {n: t for n, t in state.items() if not n.startswith(inside)}, {}

    def get_state_dict(self, model: Any) -> dict[str, Any]:
        """The same for transformers 4."""
        return self.get_state_dict_and_metadata(model)[0]

    # --- from_pretrained, in the order of the calls -------------------------------------------------------------------

    def validate_environment(self, *_: Any, device_map: Any = None, **__: Any) -> None:
        """Refuses what transformers 4 cannot do."""
        places = device_map.values() if isinstance(device_map, dict) else [device_map]
        if KNOWS_MISSING and "disk" in places:
            raise SmoothQuantError(
                f"transformers {transformers.__version__} cannot offload int8 layers to the disk: name other devices "
                "in device_map, or upgrade to transformers 5."
            )

    def update_dtype(self, dtype: Any) -> Any:
        """The type that is asked for. None, which transformers 4 passes on, is the checkpoint's."""
        return "auto" if dtype is None else dtype

    def update_tp_plan(self, config: Any) -> Any:
        """Before releases had `update_attn_implementation`, this hook saw the configuration before weight lookup."""
        return self.update_attn_implementation(config)

    def update_attn_implementation(self, config: Any) -> Any:
        """Sets the weight file and the attention, which config.json or the manifest of an earlier release names."""
        weights, attention = weights_and_attention(self.quantization_config, config)
        if weights is not None:
            # config.json must not have it there, or a transformers without our method would continue with random
            # weights.
            config.transformers_weights = weights
        if attention in skeletons.ATTENTIONS and not config._attn_implementation_internal:
            config._attn_implementation = attention
        return config

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        self._loading = Loading(self.quantization_config, model, kwargs.get("checkpoint_files"))

    def update_expected_keys(self, model: Any, expected_keys: list[str], _: list[str]) -> list[str]:
        """Makes transformers 4 read all tensors in the types that they were saved in, and not round the scales."""
        model.config._pre_quantization_dtype = None
        return expected_keys

    def update_missing_keys(self, model: Any, missing_keys: list[str], _: str) -> list[str]:
        """Called by transformers 4 only."""
        self._now.refuse_missing(missing_keys)
        return missing_keys

    def update_unexpected_keys(self, model: Any, unexpected_keys: list[str], _: str) -> list[str]:
        """Called by transformers 4 only."""
        self._now.refuse_unexpected(unexpected_keys)
        return [key for key in unexpected_keys if not self._now.ignored.search(key)]

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        spread = tensor_parallel.float_placements(model)
        self._now.finish(model)
        self._loading = None
        for owner, attribute, value in quantizers(model):
            setattr(owner, attribute, value)
        tensor_parallel.finish(model, spread)
        return model

    @property
    def _now(self) -> Loading:
        assert self._loading is not None
        return self._loading

    def dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        """`model.dequantize()`: the float model that the int8 layers represent."""
        return dequantized(model, dtype)


class _EarlyName:
    """`config.transformers_weights` of a configuration that names our method, for releases that read it too early.

    It has no effect on the files that are written, on other configurations, or after a quantizer was made.
    """

    def __get__(self, config: Any, _: type) -> str:
        described = None if config is None else vars(config).get("quantization_config")
        if type(described) is dict and described.get("quant_method") == skeletons.QUANT_METHOD:
            name, _attention = weights_and_attention(Config(**described), config)
            if name is not None:
                return name
        raise AttributeError("transformers_weights")


def name_weights_early() -> None:
    """Lets transformers 4, which looks for the weight file before it asks a quantizer, find ours."""
    if KNOWS_MISSING:
        cls: Any = transformers.PretrainedConfig
        cls.transformers_weights = _EarlyName()
