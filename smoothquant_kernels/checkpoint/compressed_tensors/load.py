"""Loads W8A8 checkpoints of llm-compressor: its int8 layers become `W8A8Linear`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from smoothquant_kernels.checkpoint import skeleton as skeletons
from smoothquant_kernels.checkpoint.compressed_tensors.published import own_names
from smoothquant_kernels.checkpoint.compressed_tensors.scheme import (
    QUANT_METHOD,
    Quantization,
    Scheme,
    parse,
)
from smoothquant_kernels.checkpoint.compressed_tensors.weights import (
    FLOAT_TYPES,
    check_zero_points,
    entries_of,
    float_tensors,
    layer_tensors,
    ties,
    zero_points,
)
from smoothquant_kernels.checkpoint.foreign_folder import refuse
from smoothquant_kernels.checkpoint.kv_calibration import load_calibration
from smoothquant_kernels.checkpoint.load import assign, finish, rebuild
from smoothquant_kernels.checkpoint.manifest import (
    CONFIG,
    GENERATION_CONFIG,
    RECORD,
    Manifest,
    read_config,
    read_info,
)
from smoothquant_kernels.checkpoint.transformers_hook import quantizers
from smoothquant_kernels.config import SmoothQuantConfig
from smoothquant_kernels.errors import SmoothQuantError
from smoothquant_kernels.modeling.changes import Changes
from smoothquant_kernels.modeling.record import LayerRecord, ModelRecord, Reason, skipped_layers
from smoothquant_kernels.modeling.view import ModelView
from smoothquant_kernels.nn import kinds
from smoothquant_kernels.nn.float_linear import is_float_linear
from smoothquant_kernels.nn.linear import W8A8Linear
from smoothquant_kernels.storage.safetensors import TensorEntry, aligned, read


@dataclass(frozen=True)
class Plan:
    """How a folder becomes a model.

    Attributes:
        folder: the folder.
        entries: every tensor in its files, by its name there.
        names: name in the files -> name in the model, for the same tensors.
        layers: the int8 layers -> buffer of the `W8A8Linear` -> name of the tensor.
        modules: the int8 layers -> class and arguments, as in a manifest.
        floats: the other tensors of the model that the files have.
        tied: another name of a tensor of the model -> its name in `floats`.
        record: what `model.smoothquant_info` will say.
        zero_points: tensors whose values must be 0.
        version: the release of compressed-tensors that wrote the folder.
    """

    folder: Path
    entries: dict[str, TensorEntry]
    names: dict[str, str]
    layers: dict[str, dict[str, str]]
    modules: dict[str, dict[str, Any]]
    floats: list[str]
    tied: dict[str, str]
    record: ModelRecord
    zero_points: list[str]
    version: str

    @classmethod
    def of(cls, folder: Path, model: nn.Module, *, floats_follow: bool = False) -> Plan:
        """Checks the folder against a float model, whose weights may be on the meta device.

        Args:
            floats_follow: transformers loads the other tensors. So the int8 layers take the float type of the model's
                layers, not that of config.json, and tensors that transformers joins from several are not missing.

        Raises:
            SmoothQuantError: the configuration or a tensor is not one that the int8 layers can take.
        """
        _, values = read_config(folder)
        quantization = parse(values.get("quantization_config"))
        schemes = quantization.layers(model)
        stored = entries_of(folder)
        names, joined = own_names(model, stored)
        entries = {names[name]: entry for name, entry in stored.items()}
        joined = [name for name in joined if name not in entries]
        if joined and not floats_follow:
            raise SmoothQuantError(
                f"{folder} has {joined[0]} in several tensors, which transformers joins when it loads: use "
                "from_pretrained after register_transformers(compressed_tensors=True)."
            )
        linears = {name: model.get_submodule(name) for name in schemes}
        layers = {n: layer_tensors(n, linears[n], s, entries) for n, s in schemes.items()}
        expected = float_tensors(model, schemes, entries, joined)
        modules = {
            name: kinds.describe(_layer(linears[name], s, None if floats_follow else values))
            for name, s in schemes.items()
        }
        return cls(
            folder=folder,
            entries=stored,
            names=names,
            layers=layers,
            modules=modules,
            floats=[name for name in expected if name in entries],
            tied=ties(model, expected, entries),
            record=_own_record(folder, schemes) or _record(model, quantization, schemes),
            zero_points=zero_points(schemes, entries),
            version=quantization.version,
        )

    def read(self) -> dict[str, Tensor]:
        """Maps the tensors and returns those of the model: the names are its own, scales are float32 and flat.

        Raises:
            SmoothQuantError: a file is damaged, a scale is not positive and finite, or a zero point is not 0.
        """
        found = read(self.folder, self.entries)
        stored = {self.names[name]: t for name, t in found.items()}
        check_zero_points({name: stored[name] for name in self.zero_points})
        tensors = {name: stored[name] for name in self.floats}
        for layer, names in self.layers.items():
            for buffer, name in names.items():
                t = stored[name]
                tensors[f"{layer}.{buffer}"] = t if buffer == "w_q" else t.float().reshape(-1)
        try:
            skeletons.check_scales(tensors, self.modules)
        except SmoothQuantError as error:
            raise SmoothQuantError(f"{self.folder}: {error}") from None
        return tensors

    def manifest(self, name: str) -> Manifest:
        """The same as a manifest for a model class, with the names of the files."""
        files = sorted({entry["file"] for entry in self.entries.values()})
        sizes = {file: (self.folder / file).stat().st_size for file in files}
        return Manifest(
            model={"name": name, "module": "", "rebuild": True, "attention": ""},
            info=self.record.to_dict(),
            modules=self.modules,
            shared_modules={},
            tensors=self.entries,
            tied=self.tied,
            non_persistent=[],
            files={file: {"size": size, "sha256": ""} for file, size in sizes.items()},
            package_version=self.version,
        )


def load_other(
    folder: Path,
    method: str,
    *,
    device: torch.device,
    model: nn.Module | None,
    optimize: bool = False,
) -> nn.Module:
    """Loads a folder that another tool wrote, or raises SmoothQuantError with what to do instead.

    Args:
        folder, device, model, optimize: as in `load_quantized`.
        method: the result of `quant_method`.
    """
    if method != QUANT_METHOD:
        refuse(folder, method)
    plan, skeleton = plan_of(folder, model)
    tensors = plan.read()
    with Changes() as changes:
        changes.keep_modules(skeleton)
        skeletons.install(skeleton, skeletons.make_modules(plan.modules, {}))
        assign(skeleton, tensors, plan.manifest(type(skeleton).__name__), device)
        plan.record.attach(skeleton)
        load_calibration(folder, skeleton)
        finish(skeleton, changes, optimize=optimize)
    return skeleton


def plan_of(folder: Path, model: nn.Module | None = None) -> tuple[Plan, nn.Module]:
    """The plan of a folder, and the model to fill: `model`, or a new one without weights."""
    _, values = read_config(folder)
    parse(values.get("quantization_config"))  # before the model, because its sentence says more
    if model is None:
        model = _skeleton(folder, values)
    return Plan.of(folder, model), model


def _skeleton(folder: Path, values: Mapping[str, Any]) -> nn.Module:
    architectures = values.get("architectures")
    if not isinstance(architectures, list) or len(architectures) != 1:
        raise SmoothQuantError(
            f"{folder / CONFIG} must name the class of the model; got architectures {architectures!r}: copy it again, "
            "or pass model= with a model of that class."
        )
    generates = (folder / GENERATION_CONFIG).is_file()
    skeleton: Any = rebuild(folder, str(architectures[0]), "", generates=generates)
    skeleton.tie_weights()  # the construction on the meta device separates tied parameters
    return skeleton  # type: ignore[no-any-return]


def _layer(linear: nn.Module, scheme: Scheme, values: Mapping[str, Any] | None) -> W8A8Linear:
    """The int8 layer on the meta device."""
    weight: Any = linear.weight
    n, k = weight.shape
    named = str((values or {}).get("dtype") or (values or {}).get("torch_dtype"))
    return W8A8Linear(
        k,
        n,
        getattr(linear, "bias", None) is not None,
        activation_scheme=scheme.activation_scheme,
        weight_granularity=scheme.weight_granularity,
        device="meta",
        dtype=getattr(torch, named) if named in FLOAT_TYPES else weight.dtype,
    )


def _own_record(folder: Path, schemes: Mapping[str, Scheme]) -> ModelRecord | None:
    """The record that this package left in a folder that it wrote; None if there is none of these layers."""
    if not (folder / RECORD).is_file():
        return None
    record = ModelRecord.from_dict(read_info(folder))
    return record if record.described.keys() == schemes.keys() else None


def _record(
    model: nn.Module, quantization: Quantization, schemes: Mapping[str, Scheme]
) -> ModelRecord:
    """What was done to the model, as far as the checkpoint says."""
    heads = ModelView(model).heads
    scheme, granularity = (
        Counter(getattr(s, key) for s in schemes.values()).most_common(1)[0][0]
        for key in ("activation_scheme", "weight_granularity")
    )
    own = {n: s.activation_scheme for n, s in schemes.items() if s.activation_scheme != scheme}
    config = SmoothQuantConfig(
        smooth=False,
        rotation="none",
        activation_scheme=scheme,
        weight_granularity=granularity,
        schemes=own,
        massive_activations="keep",
        quantize_head=bool(heads & schemes.keys()),
    )
    skipped = {
        name: (Reason.OUTPUT_HEAD if name in heads else Reason.FLOAT_IN_CHECKPOINT)()
        for name, module in model.named_modules()
        if is_float_linear(module) and name not in schemes
    }
    reason = Reason.IMPORTED()
    layers = []
    for name, layer in schemes.items():
        weight: Any = model.get_submodule(name).weight
        n, k = weight.shape
        layers.append(
            LayerRecord(
                name,
                reason=reason,
                activation_scheme=layer.activation_scheme,
                in_features=k,
                out_features=n,
            )
        )
    more = {"format": QUANT_METHOD, "format_version": quantization.version}
    return ModelRecord(config.to_dict(), tuple(layers), skipped_layers(skipped), more=more)


def fill(plan: Plan, model: nn.Module) -> None:
    """Gives the int8 layers of a model that has them their tensors, each on the device of its layer."""
    tensors = plan.read()
    for name, names in plan.layers.items():
        layer = model.get_submodule(name)
        assert isinstance(layer, W8A8Linear)
        place = next((b.device for b in layer.buffers() if not b.is_meta), torch.device("cpu"))
        own = {buffer: aligned(tensors[f"{name}.{buffer}"]).to(place) for buffer in names}
        layer.load_state_dict(own, assign=True)
    # The model becomes one of ours, which `save_pretrained` writes in our format.
    plan.record.attach(model)
    for owner, attribute, value in quantizers(model):
        setattr(owner, attribute, value)
