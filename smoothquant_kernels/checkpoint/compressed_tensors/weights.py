"""The weight files of a compressed-tensors checkpoint: what they hold, and whether it fits the layers."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from smoothquant_kernels.checkpoint.compressed_tensors.scheme import (
    INPUT_SCALE,
    WEIGHT,
    WEIGHT_SCALE,
    ZERO_POINTS,
    Scheme,
)
from smoothquant_kernels.errors import SmoothQuantError
from smoothquant_kernels.storage.safetensors import NAMES, TensorEntry, read_header

_WEIGHTS = "model.safetensors"
_INDEX = f"{_WEIGHTS}.index.json"
_TYPES = {name: str(dtype).removeprefix("torch.") for dtype, name in NAMES.items()}
#: Exact in float32.
FLOAT_TYPES = ("float32", "float16", "bfloat16")
#: The entry of a checkpoint -> the buffer of a `W8A8Linear`.
BUFFERS = {WEIGHT: "w_q", WEIGHT_SCALE: "w_scale", INPUT_SCALE: "x_scale", "bias": "bias"}
#: Buffers that older models had and transformers ignores.
_IGNORED = (r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$")


def entries_of(folder: Path) -> dict[str, TensorEntry]:
    """The tensors in the weight files of a folder, from the headers of the files.

    Raises:
        SmoothQuantError: there are no safetensors files, one is damaged, or the index does not match them.
    """
    entries: dict[str, TensorEntry] = {}
    index = _index(folder)
    for file in sorted(set(index.values())) if index is not None else [_WEIGHTS]:
        for name, entry in read_header(folder / file)[0].items():
            if entry["dtype"] not in _TYPES:
                raise SmoothQuantError(
                    f"{name} in {folder / file} has the type {entry['dtype']}, and known are {', '.join(_TYPES)}: "
                    "load it with the tool that wrote it."
                )
            entries[name] = {
                "file": file,
                "dtype": _TYPES[entry["dtype"]],
                "shape": list(entry["shape"]),
            }
    found = {name: entry["file"] for name, entry in entries.items()}
    if index is not None and (wrong := index.items() ^ found.items()):
        raise SmoothQuantError(
            f"{folder / _INDEX} and the weight files differ at {min(wrong)[0]}: copy the checkpoint again."
        )
    return entries


def _index(folder: Path) -> dict[str, str] | None:
    """The index of several weight files, name -> file; None if there is one file."""
    path = folder / _INDEX
    if (folder / _WEIGHTS).is_file():
        return None
    if not path.is_file():
        raise SmoothQuantError(
            f"{folder} has neither {_WEIGHTS} nor {_INDEX}: copy the checkpoint again, or save it as safetensors."
        )
    try:
        found = json.loads(path.read_text("utf-8"))["weight_map"]
        plain = {str(name): str(file) for name, file in found.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise SmoothQuantError(f"{path} cannot be read ({error!r:.200}): copy it again.") from None
    for file in set(plain.values()):
        if Path(file).name != file or "\\" in file or not file.endswith(".safetensors"):
            raise SmoothQuantError(
                f"{path} names the file {file!r}, and only safetensors files of this folder are read: copy it again."
            )
    return plain


def layer_tensors(
    name: str, linear: nn.Module, scheme: Scheme, entries: Mapping[str, TensorEntry]
) -> dict[str, str]:
    """The tensors of an int8 layer: buffer of the `W8A8Linear` -> name in the files.

    Raises:
        SmoothQuantError: one is missing, or has another type or shape than the layer needs.
    """
    weight: Any = linear.weight
    n, k = weight.shape
    channels = [[n, 1], [n]] if scheme.weight_granularity == "channel" else [[1], []]
    wanted: dict[str, tuple[tuple[str, ...], list[list[int]]]] = {
        WEIGHT: (("int8",), [[n, k]]),
        WEIGHT_SCALE: (FLOAT_TYPES, channels),
    }
    if scheme.activation_scheme == "static":
        wanted[INPUT_SCALE] = (FLOAT_TYPES, [[1], []])
    if getattr(linear, "bias", None) is not None:
        wanted["bias"] = (FLOAT_TYPES, [[n]])
    for leaf, (types, shapes) in wanted.items():
        entry = entries.get(f"{name}.{leaf}")
        if entry is None:
            raise SmoothQuantError(
                f"{name} is int8 by the quantization_config and has no {leaf} in the weight files: copy the "
                "checkpoint again, or quantize the model again."
            )
        if entry["dtype"] not in types or entry["shape"] not in shapes:
            raise SmoothQuantError(
                f"{name}.{leaf} is {entry['dtype']} {entry['shape']}, and this {scheme.activation_scheme} layer with "
                f"weights per {scheme.weight_granularity} needs {' or '.join(types)} "
                f"{' or '.join(map(str, shapes))}: quantize the model again, or correct its quantization_config."
            )
    return {BUFFERS[leaf]: f"{name}.{leaf}" for leaf in wanted}


def zero_points(layers: Mapping[str, Scheme], entries: Mapping[str, TensorEntry]) -> list[str]:
    """The zero points of the layers. Symmetric layers need none, and all must be 0."""
    named = (f"{layer}.{leaf}" for layer in layers for leaf in ZERO_POINTS)
    return [name for name in named if name in entries]


def check_zero_points(tensors: Mapping[str, Tensor]) -> None:
    """Raises SmoothQuantError for a zero point that is not 0."""
    for name, tensor in tensors.items():
        if bool((tensor != 0).any()):
            raise SmoothQuantError(
                f"{name} is not 0 and the quantization_config says symmetric: copy the checkpoint again, or quantize "
                "the model again."
            )


def float_tensors(
    model: nn.Module,
    layers: Mapping[str, Scheme],
    entries: Mapping[str, TensorEntry],
    joined: Collection[str] = (),
) -> dict[str, Tensor]:
    """The state of the model outside its int8 layers, as it is on the model: name -> tensor.

    Args:
        joined: tensors that something else makes of several in the files. If there are any, so are unknown tensors.

    Raises:
        SmoothQuantError: the files do not have exactly these tensors and those of the layers.
    """
    inside = tuple(f"{name}." for name in layers)
    state = model.state_dict(keep_vars=True)
    expected = {
        name: t for name, t in state.items() if not name.startswith(inside) and name not in joined
    }
    known = {n: e for n, e in entries.items() if not joined or n in state or n.startswith(inside)}
    if problem := next(_misfits(model, expected, inside, known), None):
        raise SmoothQuantError(
            f"the checkpoint does not fit a {type(model).__name__} of its configuration, {problem}: copy it again, or "
            "install the release of transformers that it was made with."
        )
    return expected


def _misfits(
    model: nn.Module,
    expected: Mapping[str, Any],
    inside: tuple[str, ...],
    entries: Mapping[str, TensorEntry],
) -> Iterator[str]:
    ignored = [*(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()), *_IGNORED]
    known = {f"{layer}{leaf}" for layer in inside for leaf in (*BUFFERS, *ZERO_POINTS)}
    tied = ties(model, expected, entries)
    for name, entry in entries.items():
        if name in known:
            continue
        want = expected.get(name)
        if name.startswith(inside):
            yield f"{name} is no tensor of a {WEIGHT}-and-scale layer"
        elif want is None:
            if not any(re.search(pattern, name) for pattern in ignored):
                yield f"it has no tensor {name}"
        elif list(want.shape) != entry["shape"]:
            yield f"{name} has shape {list(want.shape)} there, not {entry['shape']}"
        elif entry["dtype"] == "int8" and want.is_floating_point():
            yield f"{name} is int8 in the files and its layer is in float by the quantization_config"
        elif getattr(torch, entry["dtype"]).is_floating_point != want.is_floating_point():
            yield f"{name} is {want.dtype} there, not {entry['dtype']}"
    for name in expected:
        if name not in entries and name not in tied:
            yield f"{name} is not in the files"


def ties(
    model: nn.Module, expected: Mapping[str, Any], entries: Mapping[str, TensorEntry]
) -> dict[str, str]:
    """The tensors that are in the files under another name: name -> name in the files."""
    # transformers 5 ties parameters after loading only, and says which in this attribute.
    tied = dict(getattr(model, "all_tied_weights_keys", None) or {})
    stored = {id(t): name for name, t in expected.items() if name in entries}
    found = {
        n: str(tied.get(n) or stored.get(id(t))) for n, t in expected.items() if n not in entries
    }
    return {name: source for name, source in found.items() if source in entries}
