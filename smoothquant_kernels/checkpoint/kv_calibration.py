"""The calibration of an int8 cache, in a checkpoint folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from smoothquant_kernels.errors import SmoothQuantError
from smoothquant_kernels.kv_cache.calibration import (
    KVCalibration,
    LayerMaxima,
    attach_calibration,
    calibration_of,
)
from smoothquant_kernels.storage.digests import FileEntry
from smoothquant_kernels.storage.safetensors import write_safetensors

#: In a folder of its own, because loaders take all safetensors files beside config.json for weights.
KV_FILE = "kv_cache/calibration.safetensors"
_FORMAT = "smoothquant-kernels kv_cache 1"


def write_calibration(folder: Path, model: nn.Module) -> dict[str, FileEntry]:
    """Writes the calibration of a model, if it has one, and returns the manifest's entry of the file."""
    calibration = calibration_of(model)
    if calibration is None:
        return {}
    tensors = {
        f"layers.{layer}.{name}": getattr(maxima, name).float().contiguous().cpu()
        for layer, maxima in calibration.layers.items()
        for name in "qkv"
    }
    facts = {"content": _FORMAT, "tokens": str(calibration.tokens)}
    (folder / KV_FILE).parent.mkdir(exist_ok=True)
    return {KV_FILE: write_safetensors(folder / KV_FILE, tensors, facts)}


def load_calibration(folder: Path, model: nn.Module) -> None:
    """Gives a model the calibration of its folder, if that has one; see `read_calibration`."""
    if (folder / KV_FILE).is_file():
        attach_calibration(model, read_calibration(folder))


def read_calibration(folder: Path) -> KVCalibration:
    """The calibration in a folder.

    Raises:
        SmoothQuantError: the file is damaged, or another release wrote it in another format.
    """
    path = folder / KV_FILE
    try:
        with safe_open(path, framework="pt", device="cpu") as data:
            facts: dict[str, str] = data.metadata() or {}
            tensors = {name: data.get_tensor(name).clone() for name in data.keys()}
    except (SafetensorError, OSError) as error:
        raise SmoothQuantError(f"{path} cannot be read ({error}): copy it again.") from None
    if facts.get("content") != _FORMAT:
        raise SmoothQuantError(
            f"{path} is in the format {facts.get('content')!r} and this release reads {_FORMAT!r}: upgrade with "
            "`pip install --upgrade smoothquant-kernels`, or delete the file to do without a calibrated cache."
        )
    try:
        return KVCalibration(_layers(tensors), int(facts["tokens"]))
    except (KeyError, ValueError) as error:
        raise SmoothQuantError(f"{path} is damaged ({error}): copy it again.") from None


def _layers(tensors: dict[str, Tensor]) -> dict[int, LayerMaxima]:
    """The layers; raises KeyError or ValueError unless each has q, k and v that can be maxima."""
    named: dict[int, dict[str, Any]] = {}
    for name, t in tensors.items():
        prefix, number, kind = name.split(".")
        if prefix != "layers" or kind not in ("q", "k", "v"):
            raise ValueError(f"{name} is no tensor of a calibration")
        if t.dim() != 2 or t.dtype != torch.float32:
            raise ValueError(f"{name} is {t.dtype} {list(t.shape)}")
        if not bool((t.isfinite() & (t >= 0)).all()):
            raise ValueError(f"{name} has a value that is no magnitude")
        named.setdefault(int(number), {})[kind] = t
    layers: dict[int, LayerMaxima] = {}
    for layer, parts in sorted(named.items()):
        q, k, v = parts["q"], parts["k"], parts["v"]
        if q.shape != k.shape or k.shape[0] != v.shape[0]:
            raise ValueError(f"q, k and v of layer {layer} do not fit each other")
        layers[layer] = LayerMaxima(q, k, v)
    if not layers:
        raise ValueError("it has no layer")
    return layers
