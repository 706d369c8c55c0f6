"""Saves quantized models as safetensors and JSON, whole or not at all."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from smoothquant_kernels.checkpoint import skeleton as skeletons
from smoothquant_kernels.checkpoint.compressed_tensors import export as exports
from smoothquant_kernels.checkpoint.compressed_tensors.published import as_published
from smoothquant_kernels.checkpoint.compressed_tensors.scheme import QUANT_METHOD
from smoothquant_kernels.checkpoint.kv_calibration import write_calibration
from smoothquant_kernels.checkpoint.manifest import (
    CONFIG,
    GENERATION_CONFIG,
    INDEX,
    MANIFEST,
    MARKERS,
    Manifest,
)
from smoothquant_kernels.checkpoint.skeleton import check_scales
from smoothquant_kernels.errors import SmoothQuantError
from smoothquant_kernels.modeling.record import info_of
from smoothquant_kernels.nn import kinds
from smoothquant_kernels.storage.digests import file_entry
from smoothquant_kernels.storage.folder import new_folder
from smoothquant_kernels.storage.safetensors import (
    TensorEntry,
    assign_files,
    check_storable,
    tensor_entries,
    unique,
    write_safetensors,
)
from smoothquant_kernels.storage.versions import package_version

MAX_SHARD_BYTES = 5_000_000_000
#: The formats of checkpoint folders.
NATIVE = "native"
FORMATS = (NATIVE, QUANT_METHOD)


def save_quantized(
    model: nn.Module,
    directory: str | Path,
    *,
    tokenizer: Any = None,
    overwrite: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    format: str = NATIVE,
) -> Path:
    """Writes a quantized model to a folder (docs/reference/checkpoint.md has the formats).

    The folder appears when everything is on the disk. A crash, Ctrl-C or a full disk never leaves half of it.

    Args:
        model: what `quantize_model` returned; not changed. Its `smoothquant_kv_calibration` is written too, if it has
            one (`calibrate_kv_cache`).
        directory: the folder. Unless `overwrite`, it must be empty or not exist.
        tokenizer: its files are written too, so that the folder is self-contained.
        overwrite: replace an existing checkpoint, which is lost only after the new one is complete.
        max_shard_bytes: the most tensor bytes in one safetensors file. A larger tensor gets a file of its own.
        format: ``"native"``, which holds everything and which `load_quantized` loads bit for bit; or
            ``"compressed-tensors"``, which vLLM, SGLang and transformers load without this package. It needs a model
            quantized with `folding="only"` and `rotation="none"` (docs/guides/serving.md).

    Returns:
        The folder.

    Raises:
        SmoothQuantError: nothing is quantized, a scale is NaN, a tensor has no data, the folder exists, the disk is
            full, or the format cannot express a layer, which the message names.

    Equivalent to:
        safetensors.torch.save_model(model, directory / "smoothquant.safetensors"), plus what is needed to load it.
    """
    check_shard_bytes(max_shard_bytes)
    check_tokenizer(tokenizer)
    check_format(format)
    path = Path(directory)
    if format != NATIVE:
        _export(model, path, tokenizer, overwrite, max_shard_bytes)
        return path
    texts = config_texts(model)
    manifest, tensors = _describe(model, texts, max_shard_bytes)
    with new_folder(path, markers=MARKERS, overwrite=overwrite) as folder:
        manifest.files.update(write_calibration(folder, model))
        write_other_files(folder, manifest, texts, tokenizer)
        for shard in sorted({entry["file"] for entry in manifest.tensors.values()}):
            part = {n: tensors[n] for n, e in manifest.tensors.items() if e["file"] == shard}
            manifest.files[shard] = write_safetensors(folder / shard, part)
        (folder / MANIFEST).write_text(manifest.to_json(), "utf-8")
    return path


# --- saving -----------------------------------------------------------------------------------------------------------


def _export(
    model: nn.Module, path: Path, tokenizer: Any, overwrite: bool, max_shard_bytes: int
) -> None:
    """Writes the folder in the compressed-tensors format."""
    _check_quantized(model)
    texts = config_texts(model)
    again = constructed_again(model, texts)
    scheme = exports.quantization_config(model, again)
    assert again is not None
    tensors, tied = unique(exports.export_state(model))
    tensors |= {alias: tensors[name] for alias, name in exports.own_ties(tied, again).items()}
    check_scales(skeletons.layer_state(model), skeletons.describe_modules(model)[0])
    tensors = as_published(model, tensors)
    files = assign_files(tensors, max_shard_bytes, exports.STEM)
    with new_folder(path, markers=MARKERS, overwrite=overwrite) as folder:
        for shard in sorted(set(files.values())):
            write_safetensors(folder / shard, {n: tensors[n] for n in files if files[n] == shard})
        exports.write_description(folder, model, scheme, texts, files, tokenizer)
        write_calibration(folder, model)


def _check_quantized(model: nn.Module) -> None:
    if any(kinds.is_quantized(module) for module in model.modules()):
        return
    smoothed = " (it is smoothed, but in float)" if info_of(model) else ""
    raise SmoothQuantError(
        f"the model has no quantized layer{smoothed}: run quantize_model on it first, or save a float model with "
        "save_pretrained."
    )


def _describe(
    model: nn.Module, texts: Mapping[str, str], max_shard_bytes: int
) -> tuple[Manifest, dict[str, Tensor]]:
    """Returns the manifest without its files, and the tensors to write."""
    _check_quantized(model)
    modules, shared = skeletons.describe_modules(model)
    tensors, tied = unique(skeletons.layer_state(model))
    check_scales(tensors, modules)
    again = constructed_again(model, texts)
    non_persistent = non_persistent_buffers(model, again, tensors.keys() | tied.keys())
    tensors |= non_persistent
    entries = tensor_entries(tensors, assign_files(tensors, max_shard_bytes))
    manifest = make_manifest(
        model,
        again,
        modules=modules,
        shared=shared,
        tensors=entries,
        tied=tied,
        non_persistent=list(non_persistent),
    )
    return manifest, tensors


def constructed_again(model: nn.Module, texts: Mapping[str, str]) -> nn.Module | None:
    """The model that transformers will make from config.json, or None for a class that transformers does not have."""
    if skeletons.is_transformers(type(model)) and CONFIG in texts:
        return skeletons.build(type(model), texts[CONFIG], _attention(model))
    return None


def _attention(model: nn.Module) -> str:
    return str(getattr(getattr(model, "config", None), "_attn_implementation", ""))


def make_manifest(
    model: nn.Module,
    again: nn.Module | None,
    *,
    modules: dict[str, dict[str, Any]],
    shared: dict[str, str],
    tensors: dict[str, TensorEntry],
    tied: dict[str, str],
    non_persistent: list[str],
) -> Manifest:
    """Returns the manifest without its files. Warns if `load_quantized` will need a model for the checkpoint."""
    cls = type(model)
    manifest = Manifest(
        model={
            "name": cls.__name__,
            "module": cls.__module__,
            "rebuild": True,
            "attention": _attention(model),
        },
        info=info_of(model),
        modules=modules,
        shared_modules=shared,
        tensors=tensors,
        tied=tied,
        non_persistent=non_persistent,
        files={},
        package_version=package_version(),
    )
    manifest.to_json()  # raises its error before anything is written
    problem = "transformers does not define its class"
    if again is not None:
        problem = next(
            skeletons.mismatches(again, skeletons.make_modules(modules, shared), manifest), ""
        )
    if problem:
        manifest.model["rebuild"] = False
        warnings.warn(
            f"load_quantized will need model=, a float {cls.__name__} of this architecture: {problem}.",
            stacklevel=4,
        )
    return manifest


def write_other_files(
    folder: Path, manifest: Manifest, texts: Mapping[str, str], tokenizer: Any
) -> None:
    """Writes the tokenizer, the configuration and the index. Adds every file of the folder to the manifest."""
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    weight_map = {name: entry["file"] for name, entry in manifest.tensors.items()}
    weights, *more = sorted(set(weight_map.values()))
    if more:
        weights = INDEX
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n", "utf-8")
    for name, text in texts.items():
        text = skeletons.with_weights(text, weights) if name == CONFIG else text
        (folder / name).write_text(text, "utf-8")
    for file in sorted(folder.rglob("*")):
        name = file.relative_to(folder).as_posix()
        if file.is_file() and name not in manifest.files:
            manifest.files[name] = file_entry(file)


def check_shard_bytes(limit: int) -> None:
    if limit < 1:
        raise SmoothQuantError(f"max_shard_bytes must be at least 1, got {limit}.")


def check_format(format: str) -> None:
    if format not in FORMATS:
        raise SmoothQuantError(f"format must be one of {', '.join(FORMATS)}; got {format!r}.")


def check_tokenizer(tokenizer: Any) -> None:
    """Raises SmoothQuantError unless `tokenizer` is None or can be saved."""
    if tokenizer is not None and not hasattr(tokenizer, "save_pretrained"):
        raise SmoothQuantError(
            f"tokenizer must have save_pretrained, as those of transformers do; got {type(tokenizer).__name__}."
        )


def config_texts(model: Any) -> dict[str, str]:
    """The files that transformers reads, as name -> text; empty unless the model is one of transformers."""
    texts = {}
    if hasattr(getattr(model, "config", None), "to_json_string"):
        texts[CONFIG] = skeletons.config_json(model)
        if getattr(model, "generation_config", None) is not None:
            texts[GENERATION_CONFIG] = model.generation_config.to_json_string() + "\n"
    return texts


def non_persistent_buffers(
    model: nn.Module, again: nn.Module | None, persistent: Set[str]
) -> dict[str, Tensor]:
    """The buffers outside the state dict, except those that the constructor makes with the same values."""
    made = dict(again.named_buffers(remove_duplicate=False)) if again is not None else {}
    found = {}
    for name, buffer in model.named_buffers(remove_duplicate=False):
        if name in persistent:
            continue
        value, other = check_storable(name, buffer).cpu(), made.get(name)
        if other is None or other.dtype != value.dtype or not torch.equal(other.cpu(), value):
            found[name] = value
    return found
