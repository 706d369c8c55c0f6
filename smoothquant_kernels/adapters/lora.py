"""peft's LoRA on int8 layers: which adapters fit, and the layer that computes them.

This module imports peft, so import it late.
"""

from __future__ import annotations

import copy
from typing import Any, ClassVar, NoReturn

from peft import PEFT_TYPE_TO_TUNER_MAPPING, PeftType
from peft.tuners import tuners_utils
from peft.tuners.lora import layer as peft_layers
from peft.tuners.lora import model as peft_model
from torch import nn

from smoothquant_kernels.errors import SmoothQuantError
from smoothquant_kernels.modeling.record import rescaled_layers
from smoothquant_kernels.nn.kinds import is_quantized_linear, kind_of

#: Initializations of peft that replace the float weight of the layer by what the adapter leaves of it.
_CHANGES_WEIGHT = ("pissa", "corda", "olora", "loftq", "lora_ga")
_REMEDY = "merge the adapter into the float model and quantize that, or leave the adapter unmerged"


def _base(module: nn.Module) -> nn.Module:
    """The layer below the adapters."""
    below: nn.Module = module
    if isinstance(module, tuners_utils.BaseTunerLayer):
        below = module.get_base_layer()
    return below


class Linear(peft_layers.Linear):  # type: ignore[misc]
    """peft's LoRA layer around an int8 layer. peft recognizes it as a linear by the name of the class."""

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, config: Any, **kwargs: Any
    ) -> None:
        # The weight of an int8 layer is [N, K], also where that of the float layer, GPT-2's Conv1D, is [K, N].
        own = copy.copy(config)
        own.fan_in_fan_out = False
        super().__init__(base_layer, adapter_name, config=own, **kwargs)

    def _get_in_out_features(self, module: Any) -> tuple[int, int]:
        return module.in_features, module.out_features

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> NoReturn:
        """Refused: int8 weights cannot hold an adapter."""
        raise SmoothQuantError(f"merge() would write an adapter into an int8 layer: {_REMEDY}.")


class LoraModel(peft_model.LoraModel):  # type: ignore[misc]
    """peft's LoRA model, for models with or without int8 layers."""

    allow_rescaled: ClassVar[bool] = False

    def inject_adapter(
        self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any
    ) -> None:
        """Checks all targets first, because peft's own errors would leave a part of the adapter in the model."""
        layers = {
            name: module
            for name, module in model.named_modules()
            if is_quantized_linear(_base(module)) and not name.endswith(".base_layer")
        }
        if layers:
            config = self.peft_config[adapter_name]
            _name_all_linears(config, model, layers)
            config = self._prepare_adapter_config(config, self.get_model_config(model))
            named = _named_by(kwargs.get("state_dict"))
            targets = {
                name: _base(module)
                for name, module in layers.items()
                if (
                    self._check_target_module_exists(config, name)
                    if named is None
                    else name in named
                )
            }
            self._refuse(model, config, adapter_name, targets)
            _refuse_saving(config, adapter_name, layers)
        super().inject_adapter(model, adapter_name, *args, **kwargs)

    def _refuse(
        self, model: nn.Module, config: Any, adapter_name: str, targets: dict[str, nn.Module]
    ) -> None:
        """Raises SmoothQuantError for an adapter that int8 layers cannot serve."""
        if not targets:
            return
        first = next(iter(targets))
        start = f"adapter {adapter_name!r} targets {len(targets)} int8 layers ({first} first)"
        how = str(config.init_lora_weights).lower()
        if getattr(config, "kasa_config", None) is not None:
            how = "kasa"
        if how.startswith((*_CHANGES_WEIGHT, "kasa")):
            raise SmoothQuantError(
                f"{start}, and its initialization {how!r} changes the float weight: train it on the float model, save "
                "it as a plain LoRA (path_initial_model_for_weight_conversion of save_pretrained) and load that."
            )
        for name, layer in targets.items():
            if (kind := kind_of(layer)) and (part := kind.part(layer)):
                raise SmoothQuantError(
                    f"{start}, and this process holds a part of {name} ({part}): attach adapters to a whole model."
                )
        moved = rescaled_layers(model)
        wrong = [name for name in targets if name in moved]
        if wrong and not self.allow_rescaled:
            raise SmoothQuantError(
                f"{start}, and smoothing has rescaled the input or output of {len(wrong)} of them ({wrong[0]}: "
                f"{moved[wrong[0]]}), so an adapter of the float model gives wrong results there: quantize with "
                "SmoothQuantConfig(folding='never'), which divides inside the quantizer instead; or call "
                "register_peft(folded=True) for an adapter that is trained on this very model."
            )

    @staticmethod
    def _create_new_module(
        lora_config: Any, adapter_name: str, target: nn.Module, **kwargs: Any
    ) -> Any:
        if is_quantized_linear(_base(target)):
            return Linear(target, adapter_name, config=lora_config, **kwargs)
        return peft_model.LoraModel._create_new_module(lora_config, adapter_name, target, **kwargs)

    def _check_merge_allowed(self) -> None:
        """Refuses `merge_adapter` and `merge_and_unload` before they change a first layer."""
        super()._check_merge_allowed()
        names = [
            name
            for name, module in self.model.named_modules()
            if isinstance(module, tuners_utils.BaseTunerLayer)
            and is_quantized_linear(_base(module))
        ]
        if names:
            raise SmoothQuantError(
                f"merging would write the adapter into {len(names)} int8 layers ({names[0]} first), which cannot hold "
                f"it: {_REMEDY}; unload() removes it."
            )


def _name_all_linears(config: Any, model: nn.Module, layers: dict[str, nn.Module]) -> None:
    """Replaces "all-linear" by names, as peft does for float linears, with int8 layers but without an output head."""
    if str(config.target_modules).lower() != tuners_utils.INCLUDE_LINEAR_LAYERS_SHORTHAND:
        return
    tuners_utils._maybe_include_all_linear_layers(config, model)
    head = getattr(model, "get_output_embeddings", lambda: None)()
    config.target_modules |= {name for name, module in layers.items() if module is not head}


def _named_by(state: dict[str, Any] | None) -> set[str] | None:
    """The layers for which a state dict has an adapter; None without one."""
    if state is None:
        return None
    return {key.rsplit(".lora_", 1)[0].removeprefix("_orig_mod.") for key in state}


def _refuse_saving(config: Any, adapter_name: str, layers: dict[str, nn.Module]) -> None:
    """Raises SmoothQuantError for int8 layers that peft would copy and train as a whole."""
    for wanted in config.modules_to_save or ():
        for name in layers:
            if name == wanted or name.endswith(f".{wanted}"):
                raise SmoothQuantError(
                    f"adapter {adapter_name!r} has {wanted!r} in modules_to_save, and {name} is int8, which cannot be "
                    f"trained: name it in skip when quantizing, or target it with LoRA instead."
                )


def install(*, folded: bool) -> None:
    """Makes `LoraModel` the one that peft takes for LoRA."""
    LoraModel.allow_rescaled = folded
    PEFT_TYPE_TO_TUNER_MAPPING[PeftType.LORA] = LoraModel
