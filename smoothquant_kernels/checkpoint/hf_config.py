"""`config.quantization_config` of a quantized transformers model.

This module imports transformers, so import it late.
"""

from __future__ import annotations

import json
from typing import Any, cast

from torch import nn
from transformers.utils.quantization_config import QuantizationConfigMixin

from smoothquant_kernels.checkpoint import skeleton as skeletons
from smoothquant_kernels.checkpoint.manifest import check_modules
from smoothquant_kernels.errors import SmoothQuantError
from smoothquant_kernels.modeling.record import info_of


class Config(QuantizationConfigMixin):
    """The quantization_config in config.json. Its attributes are JSON values; those that are None are not written.

    Attributes:
        modules, shared_modules: as in the manifest. A folder of an earlier release has them only there.
        smoothquant_info: that of the model; in the files of `save_pretrained` only.
        dtype: the type of the model, for example ``"bfloat16"``.
        types: the types of float tensors that have another one, as name of the tensor -> type.
        attention: ``"eager"`` or ``"sdpa"``, which a caller's `attn_implementation` overrides.
        weights: the file with the weights or their index; in the files of `save_quantized` only.
    """

    def __init__(
        self,
        modules: Any = None,
        shared_modules: Any = None,
        smoothquant_info: Any = None,
        dtype: Any = None,
        types: Any = None,
        attention: Any = None,
        weights: Any = None,
        **_: Any,
    ) -> None:
        self.quant_method = cast(Any, skeletons.QUANT_METHOD)
        self.modules = modules
        self.shared_modules = shared_modules
        self.smoothquant_info = smoothquant_info
        self.dtype = dtype
        self.types = types
        self.attention = attention
        self.weights = weights

    def to_dict(self) -> dict[str, Any]:
        """The JSON values, as config.json has them."""
        return {key: value for key, value in super().to_dict().items() if value is not None}

    def to_diff_dict(self) -> dict[str, Any]:
        """The same values. transformers 4 asks for them and does not define it."""
        return self.to_dict()

    @classmethod
    def of(cls, model: Any, *, complete: bool = False) -> Config:
        """Describes a quantized model, with `complete` all that `save_pretrained` writes.

        Raises:
            SmoothQuantError: `smoothquant_info` holds something that JSON cannot represent.
        """
        values = skeletons.description(model)
        if complete:
            values["smoothquant_info"] = info_of(model)
            values["types"] = other_types(model)
            try:
                json.dumps(values, allow_nan=False)
            except (TypeError, ValueError) as error:
                raise SmoothQuantError(
                    f"model.smoothquant_info must hold plain finite JSON values to be saved: {error}."
                ) from None
        return cls(**values)

    def check(self) -> None:
        """Raises SmoothQuantError unless the values, which come from a file, have the right types."""

        def fail(what: str) -> SmoothQuantError:
            return SmoothQuantError(
                f"the quantization_config in config.json is damaged or was altered ({what}): copy it again."
            )

        check_modules(self.modules, self.shared_modules or {}, fail)
        for value in (self.smoothquant_info, self.types):
            if value is not None and type(value) is not dict:
                raise fail("smoothquant_info or types is not an object")
        for name in (self.dtype, *(self.types or {}).values()):
            if skeletons.float_dtype(name) is None:
                raise fail(f"{name!r} is not a floating-point type of torch")


def other_types(model: nn.Module) -> dict[str, str]:
    """The types of the float tensors outside quantized layers that differ from the model's type.

    Buffers outside the state dict are always listed, because transformers computes them in a type of its own choice.
    """
    main = cast(Any, model).dtype
    return {
        name: str(t.dtype).removeprefix("torch.")
        for name, t, persistent in skeletons.float_tensors(model)
        if t.dtype != main or not persistent
    }
