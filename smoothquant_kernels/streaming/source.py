"""Reads a local checkpoint piece by piece: the model without weights, and the weights of one module at a time."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from smoothquant_kernels.checkpoint import skeleton as skeletons
from smoothquant_kernels.errors import SmoothQuantError
from smoothquant_kernels.modeling.foreign import check_float_config
from smoothquant_kernels.storage.safetensors import NAMES, read_header

IN_MEMORY = "load the model and use smooth_and_quantize instead"
_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
_DTYPES = {name: dtype for dtype, name in NAMES.items()}


@dataclass(frozen=True)
class _Place:
    """The location of a tensor: its file, type, shape, first byte and number of bytes."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    size: int


def check_folder(folder: Path) -> None:
    """Raises SmoothQuantError unless it is the folder of a float model. A GGUF file or a hub name is refused."""
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "is not a local folder"
        raise SmoothQuantError(
            f"{folder} {what}: streaming reads a local folder with config.json and safetensors "
            f"(`hf download` fetches one); for anything else, {IN_MEMORY}."
        )
    try:
        config = json.loads((folder / "config.json").read_text("utf-8"))
    except (OSError, ValueError):
        return  # `empty_model` reports this
    check_float_config(config, folder)


class WeightSource:
    """The safetensors files of a folder. Reads only the tensors that are asked for.

    The files are not mapped, because a mapping counts as memory of the process and does not align its tensors.

    Raises:
        SmoothQuantError: the folder has no safetensors weights, or a file is missing or damaged.
    """

    def __init__(self, folder: Path) -> None:
        check_folder(folder)
        self.folder = folder
        self.files = [folder / name for name in self._file_names()]
        self._places: dict[str, _Place] = {}
        for file in self.files:
            self._places |= _read_header(file)

    def _file_names(self) -> list[str]:
        index = self.folder / _INDEX
        if (self.folder / _SINGLE).is_file():
            return [_SINGLE]
        try:
            names = set(json.loads(index.read_text("utf-8"))["weight_map"].values())
            if not names or any(Path(name).name != name for name in names):
                raise ValueError("its weight_map is not one")
        except FileNotFoundError:
            raise SmoothQuantError(
                f"{self.folder} holds neither {_SINGLE} nor {_INDEX}: streaming reads local safetensors folders; for "
                f"anything else, {IN_MEMORY}."
            ) from None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise SmoothQuantError(
                f"{index} cannot be read ({error}): copy or download it again."
            ) from None
        return sorted(names)

    def keys(self) -> set[str]:
        return set(self._places)

    def identity(self) -> list[list[Any]]:
        """Names, sizes and times of the files, by which another call recognizes them without reading them."""
        found = [*self.files, self.folder / "config.json"]
        return [[f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in found]

    def read(self, key: str) -> Tensor:
        """Reads one tensor into memory of its own."""
        place = self._places[key]
        data = torch.empty(place.size, dtype=torch.uint8)
        try:
            with place.file.open("rb", buffering=0) as file:
                file.seek(place.start)
                view, done = data.numpy().data, 0
                while done < place.size:
                    count = file.readinto(view[done:])
                    if not count:
                        raise OSError("it ends too early")
                    done += count
        except OSError as error:
            raise SmoothQuantError(
                f"{place.file} cannot be read at {key} ({error}): copy or download it again."
            ) from error
        return data.view(place.dtype).reshape(place.shape)

    def shape(self, key: str) -> tuple[int, ...]:
        return self._places[key].shape


def _read_header(file: Path) -> dict[str, _Place]:
    """Reads the locations of the tensors of a safetensors file."""
    entries, begin = read_header(file)
    places = {}
    try:
        for name, entry in entries.items():
            dtype, shape = _DTYPES[entry["dtype"]], tuple(int(n) for n in entry["shape"])
            start, stop = entry["data_offsets"]
            size = math.prod(shape) * dtype.itemsize
            if not 0 <= start <= stop or stop - start != size:
                raise ValueError(f"{name} does not lie in it")
            places[name] = _Place(file, dtype, shape, begin + start, size)
    except (ValueError, KeyError, TypeError) as error:
        raise SmoothQuantError(
            f"{file} cannot be read ({error}): copy or download it again."
        ) from None
    return places


# --- the model --------------------------------------------------------------------------------------------------------


def empty_model(folder: Path, dtype: torch.dtype | None) -> Any:
    """Builds the model of a folder's config.json as `from_pretrained` does, with parameters on the meta device.

    Raises:
        SmoothQuantError: there is no usable config.json, or the model is already quantized, is an encoder-decoder, or
            keeps weights in another type than `dtype`.
    """
    from accelerate import init_empty_weights
    from transformers import AutoConfig, GenerationConfig

    if not (folder / "config.json").is_file():
        raise SmoothQuantError(
            f"{folder} is not a local folder with config.json: download the model first "
            "(huggingface_hub.snapshot_download)."
        )
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # a configuration class may raise anything
        raise SmoothQuantError(f"{folder}/config.json cannot be read ({error}).") from error
    check_float_config(config, folder)
    names = getattr(config, "architectures", None) or ["(none)"]
    if getattr(config, "is_encoder_decoder", False):
        raise SmoothQuantError(
            f"{names[0]} is an encoder-decoder, whose blocks are not one chain: {IN_MEMORY}."
        )
    cls = skeletons.find_class(names[0])
    dtype = dtype or _stored_dtype(config)
    # no_grad keeps autograd from recording the moves to meta.
    with torch.no_grad(), init_empty_weights(include_buffers=False):
        model = cls._from_config(config, dtype=dtype)
    model.tie_weights()  # each registration above has made a separate parameter
    plan: Mapping[str, Any] = getattr(model, "_get_dtype_plan", lambda _: {})(dtype)
    if kept := next((p for p in plan if any(p in n for n, _ in model.named_parameters())), None):
        raise SmoothQuantError(
            f"{names[0]} keeps {kept} in float32 when loaded in {dtype}: pass dtype=torch.float32, or {IN_MEMORY}."
        )
    if model.can_generate():
        has_file = (folder / "generation_config.json").is_file()
        name = "generation_config.json" if has_file else "config.json"
        model.generation_config = GenerationConfig.from_pretrained(folder, config_file_name=name)
    model.config.name_or_path = model.name_or_path = str(folder)
    return model.eval()


def _stored_dtype(config: Any) -> torch.dtype:
    dtype = getattr(config, "dtype", None)
    dtype = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


def match_names(model: Any, source: WeightSource) -> dict[str, str]:
    """Returns state-dict name -> key in the files for every tensor. Tied names share the key that the files have.

    Raises:
        SmoothQuantError: a weight is missing, is stored under another name, in another shape or in several parts, or
            tied weights are stored with different values.
    """
    keys = _model_names(model, source.keys())
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    state = model.state_dict(keep_vars=True)
    names: dict[str, str] = {}
    by_tensor: dict[int, str] = {}
    for name, tensor in state.items():
        for alias in (name, name.removeprefix(prefix), prefix + name):
            if alias in keys:
                names[name] = keys[alias]
                by_tensor.setdefault(id(tensor), keys[alias])
                break
    for name, tensor in state.items():
        key = names.setdefault(name, by_tensor.get(id(tensor), ""))
        if not key:
            raise SmoothQuantError(
                f"{source.folder} has no tensor {name}; it is incomplete, or keeps the weights in another form than "
                f"the model: {IN_MEMORY}."
            )
        if source.shape(key) != tuple(tensor.shape):
            raise SmoothQuantError(
                f"{key} has shape {list(source.shape(key))} in {source.folder} and {list(tensor.shape)} in the model: "
                f"{IN_MEMORY}."
            )
    for name, tensor in state.items():  # tied weights may be stored twice with different values
        other = by_tensor[id(tensor)]
        if names[name] != other and not torch.equal(source.read(names[name]), source.read(other)):
            raise SmoothQuantError(
                f"the configuration ties {names[name]} to {other}, but {source.folder} has different values for them: "
                f"set tie_word_embeddings to false in its config.json, or {IN_MEMORY}."
            )
    return names


def _model_names(model: Any, keys: Iterable[str]) -> dict[str, str]:
    """Returns name in the model -> key in the files.

    Most are the same, but transformers renames some (GPT-NeoX's `embed_out`). Tensors that it makes from several
    (merged experts) are left out.
    """
    keys = sorted(keys)
    names = {key: key for key in keys}
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import (
            WeightConverter,
            WeightRenaming,
            rename_source_key,
        )
    except ImportError:  # transformers 4 keeps the names of the files
        return names
    rules = get_model_conversion_mapping(model) or []
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    state = model.state_dict(keep_vars=True)
    for key in keys:
        name, merged = rename_source_key(key, renamings, converters, model.base_model_prefix, state)
        if name == key or name not in state:
            continue
        del names[key]
        if merged is None:
            names[name] = key
    return names


def fill(module: nn.Module, prefix: str, names: Mapping[str, str], source: WeightSource) -> None:
    """Reads a module's parameters and persistent buffers. `prefix` is its name in the model, with a dot at the end."""
    done: dict[int, nn.Parameter] = {}
    for name, tensor in list(module.state_dict(keep_vars=True).items()):
        if not tensor.is_meta and isinstance(tensor, nn.Parameter):
            continue
        owner, _, leaf = name.rpartition(".")
        place = module.get_submodule(owner)
        if not isinstance(tensor, nn.Parameter):
            place._buffers[leaf] = source.read(names[prefix + name]).to(tensor.dtype)
            continue
        if id(tensor) not in done:
            value = source.read(names[prefix + name]).to(tensor.dtype)
            done[id(tensor)] = nn.Parameter(value, tensor.requires_grad)
        place._parameters[leaf] = done[id(tensor)]


def owned_outside(model: nn.Module, blocks: Iterable[nn.Module]) -> list[str]:
    """Returns the names of a parameter that a block shares with another block or with the rest; empty if none."""
    seen: dict[int, int] = {}
    for i, block in enumerate(blocks):
        for parameter in block.parameters():
            if seen.setdefault(id(parameter), i) != i:
                return [n for n, p in model.named_parameters() if p is parameter]
    inside = {id(m) for block in blocks for m in block.modules()}
    for name, module in model.named_modules():
        if id(module) not in inside:
            for leaf, parameter in module.named_parameters(recurse=False):
                if id(parameter) in seen:
                    return [f"{name}.{leaf}"]
    return []
