"""Loads checkpoints, which it checks before use, without running code from them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from smoothquant_kernels.checkpoint import skeleton as skeletons
from smoothquant_kernels.checkpoint.foreign_folder import quant_method
from smoothquant_kernels.checkpoint.kv_calibration import KV_FILE, load_calibration
from smoothquant_kernels.checkpoint.manifest import (
    CONFIG,
    GENERATION_CONFIG,
    Manifest,
    check_files,
    is_checkpoint,
    read_config,
    read_manifest,
)
from smoothquant_kernels.checkpoint.skeleton import check_scales
from smoothquant_kernels.checkpoint.transformers_hook import quantizers
from smoothquant_kernels.errors import SmoothQuantError
from smoothquant_kernels.fusion.optimize import optimize_for_inference
from smoothquant_kernels.modeling.changes import Changes
from smoothquant_kernels.modeling.record import attach_info
from smoothquant_kernels.storage.safetensors import (
    aligned,
    read,
)


def load_quantized(
    directory: str | Path,
    *,
    device: torch.device | str | int | None = None,
    model: nn.Module | None = None,
    verify: bool = True,
    optimize: bool = False,
) -> nn.Module:
    """Loads what `save_quantized` wrote. Runs no code from the folder: no pickle, no remote code.

    It also loads W8A8 checkpoints of llm-compressor (compressed-tensors, int8), whose layers become `W8A8Linear`. They
    have no digests, so `verify` has no effect on them (docs/reference/checkpoint.md).

    On the CPU, the weights are mapped rather than read. They take memory as they are used, and processes share it.

    Args:
        directory: the folder.
        device: the device for the model; None is the CPU.
        model: a float model of the checkpoint's architecture, for classes that transformers does not have. Its
            weights may be on the meta device. It is changed in place and returned. Its own weights are dropped.
        verify: compare the size and SHA-256 of every file. False skips this, so files are not read whole up front.
        optimize: also call `optimize_for_inference`, as the last step. Weights that it merges are copied into memory.

    Returns:
        The model in eval mode, with `smoothquant_info` and, if it was saved, `smoothquant_kv_calibration`. Without
        `optimize`, it computes bit for bit what the saved one does.

    Raises:
        SmoothQuantError: the folder is missing, is not a checkpoint, was altered, is incomplete, was written by a newer
            release, does not fit the model, has a NaN scale, or is quantized in another format, which the message
            names; or `optimize_for_inference` fails. A model passed in stays unchanged.

    Equivalent to:
        model = AutoModelForCausalLM.from_config(config); swap in the W8A8Linear; model.load_state_dict(tensors)
    """
    folder = Path(directory).expanduser()
    place = usable_device(device)
    if not is_checkpoint(folder) and (method := quant_method(folder)) is not None:
        from smoothquant_kernels.checkpoint.compressed_tensors.load import load_other

        return load_other(folder, method, device=place, model=model, optimize=optimize)
    manifest = read_manifest(folder)
    check_files(folder, manifest, verify=verify)
    modules = skeletons.make_modules(manifest.modules, manifest.shared_modules)
    skeleton = _rebuild(folder, manifest) if model is None else model
    check_fit(skeleton, modules, manifest)
    tensors = read(folder, manifest.tensors)
    check_scales(tensors, manifest.modules)
    with Changes() as changes:
        changes.keep_modules(skeleton)
        skeletons.install(skeleton, modules)
        assign(skeleton, tensors, manifest, place)
        attach_info(skeleton, manifest.info)
        if KV_FILE in manifest.files:
            load_calibration(folder, skeleton)
        finish(skeleton, changes, optimize=optimize)
    return skeleton


def finish(model: nn.Module, changes: Changes, *, optimize: bool) -> None:
    """The last steps of loading: transformers will know the model as quantized, and it is in eval mode."""
    for owner, attribute, value in quantizers(model):
        changes.set_attribute(owner, attribute, value)
    model.eval()
    if optimize:
        optimize_for_inference(model)


def usable_device(device: torch.device | str | int | None) -> torch.device:
    """The device to load to; None is the CPU. Raises SmoothQuantError for one that cannot be used."""
    try:
        place = torch.device("cpu" if device is None else device)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA raises AssertionError
        raise SmoothQuantError(
            f"the device {device!r} cannot be used here ({str(error).splitlines()[0]})."
        ) from error
    if place.type == "meta":
        raise SmoothQuantError("a model cannot be loaded to the meta device: it holds no data.")
    return place


def _rebuild(folder: Path, manifest: Manifest) -> nn.Module:
    name = manifest.model["name"]
    if not manifest.model["rebuild"]:
        raise SmoothQuantError(
            f"the saved model is a {manifest.model['module']}.{name} that transformers cannot make: pass model= with a "
            "float model of that architecture."
        )
    generates = GENERATION_CONFIG in manifest.files
    return rebuild(folder, name, manifest.model["attention"], generates=generates)


def rebuild(folder: Path, name: str, attention: str, *, generates: bool) -> nn.Module:
    """The transformers model `name` that config.json describes, without weights.

    Args:
        attention: the implementation of attention; "" for the default one.
        generates: whether to read the generation configuration.
    """
    text, values = read_config(folder)
    if (architectures := values.get("architectures")) != [name]:
        raise SmoothQuantError(
            f"{folder / CONFIG} is for {architectures} and the weights are of a {name}: copy it again."
        )
    model: Any = skeletons.build(skeletons.find_class(name), text, attention)
    model.config.name_or_path = model.name_or_path = str(folder)
    if generates:
        from transformers import GenerationConfig

        try:
            saved = json.loads((folder / GENERATION_CONFIG).read_text("utf-8"))
            values = skeletons.plain_floats(saved)
            # transformers 4 cannot generate with the result of from_dict. Only tagged floats require it.
            model.generation_config = (
                GenerationConfig.from_pretrained(folder)
                if values == saved
                else GenerationConfig.from_dict(values)
            )
        except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
            raise SmoothQuantError(
                f"{folder / GENERATION_CONFIG} cannot be read ({error}): copy it again."
            ) from error
    return model  # type: ignore[no-any-return]


def check_fit(model: nn.Module, modules: Mapping[str, nn.Module], manifest: Manifest) -> None:
    """Raises SmoothQuantError unless the checkpoint has every tensor of the model and no other."""
    name = type(model).__name__
    problems = [f"it is a {name}"] if name != manifest.model["name"] else []
    problems += skeletons.mismatches(model, modules, manifest)
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise SmoothQuantError(
            f"the checkpoint of a {manifest.model['name']} does not fit the model, {problems[0]}{more}: pass a model "
            "of the same class and configuration."
        )


def assign(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    manifest: Manifest,
    device: torch.device | None,
) -> None:
    """Assigns the tensors, ties those that were tied, and moves the rest of the model to the device.

    Without a device, every tensor goes where the model's own is.
    """
    state = model.state_dict()  # includes metadata: the versions that modules check
    placed = {name: aligned(t).to(device or _place(model, name)) for name, t in tensors.items()}
    placed |= {alias: placed[name] for alias, name in manifest.tied.items() if name in placed}
    for name in manifest.non_persistent:
        owner, leaf = _owner(model, name)
        owner._buffers[leaf] = placed.pop(name)
    if not placed:
        return
    state.update(placed)
    model.load_state_dict(state, assign=True)
    for alias, name in manifest.tied.items():
        # One Parameter again, because two that share memory would separate at the next `.to(dtype)`.
        owner, leaf = _owner(model, alias)
        source, source_leaf = _owner(model, name)
        for kind in ("_parameters", "_buffers"):
            values = getattr(source, kind)
            if source_leaf in values and leaf in getattr(owner, kind):
                getattr(owner, kind)[leaf] = values[source_leaf]
    named = [*model.named_parameters(), *model.named_buffers()]
    if left := [name for name, t in named if t.is_meta]:
        raise SmoothQuantError(
            f"{left[0]} is on the meta device after loading: pass a model whose buffers have data."
        )
    if device is not None:
        model.to(device)


def _place(model: nn.Module, name: str) -> torch.device:
    owner, leaf = _owner(model, name)
    t = owner._parameters.get(leaf, owner._buffers.get(leaf))
    assert t is not None
    return t.device


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    owner, _, leaf = name.rpartition(".")
    return model.get_submodule(owner), leaf
