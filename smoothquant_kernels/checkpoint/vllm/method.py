"""The classes by which vLLM loads and runs our layers. This module imports vLLM, so import it late.

The tensors are plain parameters, which vLLM's first loaders (`weight_loader`, those of a bias) cut and merge. These
have been the same for many releases, unlike its parameter classes and the list of methods that may use them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, Parameter
from vllm.model_executor.layers.linear import (
    LinearBase,
    LinearMethodBase,
    UnquantizedLinearMethod,
)
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.utils import set_weight_attrs

from smoothquant_kernels import ops
from smoothquant_kernels.checkpoint.skeleton import QUANT_METHOD, check_scales
from smoothquant_kernels.checkpoint.vllm.parts import (
    Modules,
    check_shard,
    modules_in,
    modules_of,
    parts_of,
)
from smoothquant_kernels.errors import SmoothQuantError
from smoothquant_kernels.nn.kinds import describe
from smoothquant_kernels.nn.linear import W8A8Linear
from smoothquant_kernels.nn.operands import packed_rows
from smoothquant_kernels.nn.quantized_linear import MARKER
from smoothquant_kernels.ops.checks import FLOATS

#: The parts of vLLM's merged layers that go by a name; others go by a number.
_SHARDS = {"q": 0, "k": 1, "v": 2}
#: vLLM's layers of experts, in several releases. It computes all experts of a layer in one kernel.
_EXPERTS = {"FusedMoE", "RoutedExperts"}


def register_method() -> None:
    """Registers `Config` with vLLM as the method that config.json of our checkpoints names."""
    register_quantization_config(QUANT_METHOD)(Config)


class Config(QuantizationConfig):  # type: ignore[misc]
    """The `quantization_config` of config.json, as vLLM reads it: which modules are int8, and how.

    Folders of earlier releases do not list the modules there. vLLM then gives the folder to `maybe_update_config`,
    which reads the manifest.
    """

    def __init__(self, values: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.modules: Modules | None = modules_in(values or {})
        # What `save_pretrained` writes; `save_quantized` names its weight file here and leaves the markers out.
        self.has_markers = self.modules is not None and "weights" not in (values or {})

    def __repr__(self) -> str:
        return f"Config({len(self.modules or {})} modules)"

    @classmethod
    def get_name(cls) -> str:
        return QUANT_METHOD

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        return list(FLOATS)

    @classmethod
    def get_min_capability(cls) -> int:
        return 80  # the CUDA kernels start at sm_80

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Config:
        return cls(config)

    def maybe_update_config(self, model_name: str, *_: Any, **__: Any) -> None:
        if self.modules is None:
            self.modules = modules_of(model_name)

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        self.modules = hf_to_vllm_mapper.apply_dict(self._known())

    def get_quant_method(self, layer: Module, prefix: str) -> Any:
        modules = self._known()
        if isinstance(layer, (LinearBase, ParallelLMHead)):
            if parts := parts_of(prefix, modules, self.packed_modules_mapping):
                return Method(prefix, parts, has_markers=self.has_markers)
            return UnquantizedLinearMethod() if isinstance(layer, LinearBase) else None
        if _EXPERTS & {cls.__name__ for cls in type(layer).__mro__}:
            expert = next((n for n in modules if n == prefix or n.startswith(f"{prefix}.")), None)
            if expert is not None:
                raise SmoothQuantError(
                    f"vLLM computes all experts of {prefix} in one kernel, and {expert} is int8: quantize with "
                    f'skip=("{expert if expert == prefix else f"{prefix}.*"}",) to serve this model in vLLM.'
                )
        return None

    def _known(self) -> Modules:
        if self.modules is None:
            raise SmoothQuantError(
                "vLLM did not say where the checkpoint is, and its config.json does not list the quantized modules: "
                "save the checkpoint again with this release."
            )
        return self.modules


class Method(LinearMethodBase):  # type: ignore[misc]
    """One layer of a vLLM model, or its output head: the same bits as `W8A8Linear`.

    A merged layer (qkv, gate and up) is one call of `ops.linear_s8` where its parts agree in scheme, rotation, factors
    and static scale, as those that read one tensor do, unless settings by layer make them differ. It is one call for
    each part otherwise. A scale for a part's whole weight becomes one for each of its channels.

    Tensor parallelism cuts the int8 weight and its scales and bias by rows. Row-parallel layers (o_proj, down_proj) cut
    K, so each process also gets its part of the factors, and groups of a rotation must not cross the cut. Each process
    quantizes its channels with its own dynamic scales and dequantizes before vLLM adds the results, so no scale has to
    be agreed. vLLM adds the bias on the first process only.

    With the scheme ``"per_tensor"``, all tokens of a step share one scale. vLLM batches requests, so the answer to one
    then depends on the others, and on the tokens that CUDA graphs add as padding. Prefer ``"per_token"``.

    Args:
        prefix: the layer's name.
        parts: name in the checkpoint -> layer on the meta device, in the order of the merged weight's rows.
        has_markers: whether the files also have the placeholder `weight` [1] of each layer, which nothing reads.

    Equivalent to:
        torch.cat([part(x) for part in parts], -1), where each part is a `W8A8Linear`
    """

    def __init__(
        self, prefix: str, parts: dict[str, W8A8Linear], *, has_markers: bool = False
    ) -> None:
        self.prefix = prefix
        self.parts = parts
        self.has_markers = has_markers
        self._loaded: set[str] = set()
        self._calls: list[tuple[int, int, int]] = []  # part, first row, last row + 1
        self._options: list[dict[str, Any]] = [
            {
                "granularity": "tensor" if part.activation_scheme == "per_tensor" else "token",
                "rotation": part.rotation,
            }
            for part in parts.values()
        ]
        if any(part.activation_scheme == "per_tensor" for part in parts.values()):
            warnings.warn(
                f"{prefix} has one dynamic scale for all tokens of a step (per_tensor), so in vLLM an answer depends "
                "on the requests that are computed with it: use per_token or static.",
                stacklevel=2,
            )

    # --- loading ------------------------------------------------------------------------------------------------------

    def create_weights(
        self,
        layer: Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra: Any,
    ) -> None:
        k, n, count = input_size_per_partition, sum(output_partition_sizes), len(self.parts)
        if count not in (1, len(output_partition_sizes)):
            raise SmoothQuantError(
                f"{self.prefix} has {len(output_partition_sizes)} parts in vLLM and {count} in the checkpoint: this "
                "model cannot be served by vLLM in int8."
            )
        for name, part in self.parts.items():
            check_shard(name, part, k)
        ends = list(accumulate(output_partition_sizes)) if count > 1 else [n]
        self._calls = list(zip(range(count), [0, *ends[:-1]], ends, strict=True))
        own = self.parts.values()
        load = extra["weight_loader"]
        first = getattr(layer, "tp_rank", 0) * k if k < input_size else 0  # K is cut

        def factors(param: Parameter, value: Tensor, shard: Any = None) -> None:
            param.data[self._index(shard)].copy_(value.narrow(0, first, k))

        def scale(param: Parameter, value: Tensor, shard: Any = None) -> None:
            param.data[self._index(shard)].copy_(value.reshape(()))

        def rows(param: Parameter, value: Tensor, shard: Any = None) -> None:
            load(param, value, *(() if shard is None else (shard,)))

        def channels(param: Parameter, value: Tensor, shard: Any = None) -> None:
            part = list(self.parts.values())[self._index(shard)]
            rows(param, value.expand(part.out_features), shard)

        def add(name: str, value: Tensor | None, loader: Callable[..., None], **cut: int) -> None:
            param = None if value is None else Parameter(value, requires_grad=False)
            layer.register_parameter(name, param)
            if param is not None:
                set_weight_attrs(param, {"weight_loader": self._watched(name, loader), **cut})

        smooth = any(part.inv_smooth is not None for part in own)
        static = any(part.x_scale is not None for part in own)
        add("w_q", torch.empty(n, k, dtype=torch.int8), rows, output_dim=0, input_dim=1)
        add("w_scale", torch.empty(n, dtype=torch.float32), channels, output_dim=0)
        ones = torch.ones(count, k, dtype=torch.float32)  # factor 1 changes no bit
        add("inv_smooth", ones if smooth else None, factors)
        add("x_scale", ones[:, 0].clone() if static else None, scale)
        if self.has_markers:
            place = Parameter(torch.empty(0), requires_grad=False)
            layer.register_parameter(MARKER, place)
            set_weight_attrs(place, {"weight_loader": lambda *_: None})

    def _index(self, shard: Any) -> int:
        """The part that vLLM calls `shard`."""
        if len(self.parts) == 1:
            return 0
        index = _SHARDS.get(shard, shard)
        if type(index) is not int or not 0 <= index < len(self.parts):
            raise SmoothQuantError(
                f"vLLM loads a part {shard!r} of {self.prefix}, and the checkpoint has {', '.join(self.parts)}: this "
                "model cannot be served by vLLM in int8."
            )
        return index

    def _watched(self, tensor: str, loader: Callable[..., None]) -> Callable[..., None]:
        """A loader that refuses bad values and remembers which tensors came."""

        def load(param: Parameter, loaded_weight: Tensor, loaded_shard_id: Any = None) -> None:
            name, part = list(self.parts.items())[self._index(loaded_shard_id)]
            check_scales({f"{name}.{tensor}": loaded_weight}, {name: describe(part)})
            loader(param, loaded_weight, loaded_shard_id)
            self._loaded.add(f"{name}.{tensor}")

        return load

    def process_weights_after_loading(self, layer: Any) -> None:
        if self.has_markers:
            del layer._parameters[MARKER]
        for name, part in self.parts.items():
            wanted = [key for key, value in part._buffers.items() if value is not None]
            if part.bias is not None:
                wanted.remove("bias")  # vLLM's own loader takes it
                if layer.bias is None:
                    raise SmoothQuantError(
                        f"{name} has a bias in the checkpoint and none in vLLM's model: quantize with "
                        f'skip=("{name}",) to serve this model in vLLM.'
                    )
            missing = [f"{name}.{key}" for key in wanted if f"{name}.{key}" not in self._loaded]
            if missing:
                raise SmoothQuantError(
                    f"vLLM loaded no {', '.join(missing)}: copy the folder again, or quantize with "
                    f'skip=("{name}",) if vLLM does not read this layer.'
                )
        layer.w_q.data = packed_rows(layer.w_q.data)
        own = list(self.parts.values())
        agree = len({(part.activation_scheme, part.rotation) for part in own}) == 1 and all(
            bool((t.data == t.data[:1]).all())
            for t in (layer.inv_smooth, layer.x_scale)
            if t is not None
        )
        if agree:
            self._calls = [(0, 0, layer.w_q.shape[0])]
            for name in ("inv_smooth", "x_scale"):
                if (t := getattr(layer, name)) is not None:
                    t.data = t.data[0].reshape(-1).clone()

    def tie_weights(self, layer: Module, embed_tokens: Module) -> Module:
        return layer  # an int8 head has weights of its own, also where the float model's were the embedding's

    # --- running ------------------------------------------------------------------------------------------------------

    def apply(self, layer: Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        # nn.Module searches elsewhere before it finds a parameter, which takes a microsecond each.
        own: dict[str, Any] = layer._parameters
        w_q, w_scale, factors, scale = own["w_q"], own["w_scale"], own["inv_smooth"], own["x_scale"]
        if len(self._calls) == 1:
            return ops.linear_s8(
                x,
                w_q,
                w_scale,
                bias=bias,
                inv_smooth=factors,
                scale=scale,
                **self._options[0],
            )
        results = []
        for (index, start, end), part in zip(self._calls, self.parts.values(), strict=True):
            results.append(
                ops.linear_s8(
                    x,
                    w_q[start:end],
                    w_scale[start:end],
                    bias=None if bias is None else bias[start:end],
                    inv_smooth=None if factors is None else factors[index],
                    scale=None if part.x_scale is None else scale[index : index + 1],
                    **self._options[index],
                )
            )
        return torch.cat(results, -1)
