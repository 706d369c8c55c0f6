"""Which modules of a checkpoint make up a layer of a vLLM model. Nothing here imports vLLM."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from smoothquant_kernels.checkpoint.manifest import is_checkpoint, read_manifest
from smoothquant_kernels.checkpoint.skeleton import make_module
from smoothquant_kernels.errors import SmoothQuantError
from smoothquant_kernels.nn.linear import W8A8Linear

#: Name of a module in the checkpoint -> its class and constructor arguments, as in the manifest.
Modules = Mapping[str, Mapping[str, Any]]


def modules_in(values: Mapping[str, Any]) -> Modules | None:
    """The quantized modules that a config.json's `quantization_config` lists; None if it lists none.

    Raises:
        SmoothQuantError: the entries are not objects.
    """
    modules, shared = values.get("modules"), values.get("shared_modules") or {}
    if modules is None:
        return None
    if not isinstance(modules, Mapping) or not isinstance(shared, Mapping):
        raise SmoothQuantError(
            "modules of quantization_config in config.json must be an object: save the checkpoint again."
        )
    return _with_aliases(modules, shared)


def modules_of(model: str) -> Modules:
    """The quantized modules that the manifest of a local folder lists.

    Raises:
        SmoothQuantError: the folder is no checkpoint of this package, or its manifest was altered.
    """
    folder = Path(model)
    if not is_checkpoint(folder):
        raise SmoothQuantError(
            f"config.json of {model} does not list the quantized modules, and there is no local folder with a "
            "manifest of that name: give vLLM the folder that save_quantized wrote, or save the checkpoint again."
        )
    manifest = read_manifest(folder)
    return _with_aliases(manifest.modules, manifest.shared_modules)


def _with_aliases(modules: Modules, shared: Mapping[str, str]) -> Modules:
    try:
        return {**modules, **{alias: modules[name] for alias, name in shared.items()}}
    except (KeyError, TypeError):
        raise SmoothQuantError(
            "shared_modules of the checkpoint names a module that it does not have: save it again."
        ) from None


def parts_of(
    prefix: str, modules: Modules, packed: Mapping[str, Sequence[str]]
) -> dict[str, W8A8Linear]:
    """The quantized modules that become one layer of a vLLM model, in its order, each on the meta device.

    Args:
        prefix: the layer's name in the vLLM model.
        modules: the quantized modules by their names in the vLLM model, before vLLM merges layers.
        packed: last part of a merged layer's name -> those of the layers in it (`packed_modules_mapping`).

    Returns:
        name -> layer; empty for a layer that stays in float.

    Raises:
        SmoothQuantError: only some parts of a merged layer are quantized, or a module is of another kind.
    """
    stem, dot, leaf = prefix.rpartition(".")
    names = [prefix]
    if prefix not in modules:
        names = [f"{stem}{dot}{part}" for part in packed.get(leaf, ())]
    found = [name for name in names if name in modules]
    if found and found != names:
        rest = ", ".join(name for name in names if name not in modules)
        raise SmoothQuantError(
            f"vLLM merges {', '.join(names)} into one layer, and {rest} is in float: quantize all of them or none "
            "(`skip`)."
        )
    return {name: _layer(name, modules[name]) for name in found}


def _layer(name: str, arguments: Mapping[str, Any]) -> W8A8Linear:
    layer = make_module(name, arguments)
    if not isinstance(layer, W8A8Linear):
        raise SmoothQuantError(
            f"{name} is a {type(layer).__name__}, which vLLM cannot serve yet: quantize it as a W8A8Linear."
        )
    return layer


def check_shard(name: str, layer: W8A8Linear, k: int) -> None:
    """Raises SmoothQuantError unless the K input channels that one process gets are whole groups of the rotation."""
    if layer.rotation and k % layer.rotation:
        raise SmoothQuantError(
            f"{name} rotates groups of {layer.rotation} channels, and tensor parallelism gives each process "
            f"{k} of its {layer.in_features}, which cuts a group: use fewer processes, or quantize with "
            f"rotations={{{name!r}: {_largest(k)}}}."
        )


def _largest(k: int) -> str:
    power = k & -k  # the largest power of two that divides K
    return repr("none") if power < 2 else str(power)
