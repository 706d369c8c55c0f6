"""Saving and loading quantised models: safetensors and JSON, whole or not at all, checked before use."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Mapping, Set
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from smoothquant_kernels import _skeleton as skeletons
from smoothquant_kernels._folder import new_folder
from smoothquant_kernels._manifest import (
    MANIFEST,
    Manifest,
    TensorEntry,
    check_files,
    file_entry,
    read_manifest,
)
from smoothquant_kernels._safetensors import (
    aligned,
    assign_files,
    check_storable,
    dtype_name,
    read,
    unique,
    write_safetensors,
)
from smoothquant_kernels._transformers import HF_QUANTIZER, save_refusals
from smoothquant_kernels.errors import SmoothQuantError
from smoothquant_kernels.linear import W8A8Linear
from smoothquant_kernels.smooth import INFO

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
#: What `from_pretrained` reads where there are several weight files: which of them has which tensor.
INDEX = "smoothquant.safetensors.index.json"
MAX_SHARD_BYTES = 5_000_000_000
_SCALES = ("w_scale", "x_scale", "inv_smooth")


def save_quantized(
    model: nn.Module,
    directory: str | Path,
    *,
    tokenizer: Any = None,
    overwrite: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Path:
    """Writes a quantised model to a folder (docs/checkpoint.md has the format).

    The folder appears when everything is on the disk: after a crash, Ctrl-C or a full disk there is no half of it.

    Args:
        model: what `quantize_model` returned; not changed.
        directory: the folder; must not exist, or be empty, unless `overwrite`.
        tokenizer: its files are written too, so that the folder is all that is needed.
        overwrite: replace an existing checkpoint, which is lost only after the new one is complete.
        max_shard_bytes: a safetensors file holds at most this much; a larger tensor has a file for itself.

    Returns:
        The folder.

    Raises:
        SmoothQuantError: nothing is quantised, a scale is NaN, a tensor has no data, the folder exists, or the disk is
            full.

    Equivalent to:
        safetensors.torch.save_model(model, directory / "smoothquant.safetensors"), with what is needed to load it.
    """
    check_shard_bytes(max_shard_bytes)
    check_tokenizer(tokenizer)
    texts = config_texts(model)
    manifest, tensors = _describe(model, texts, max_shard_bytes)
    path = Path(directory)
    with new_folder(path, marker=MANIFEST, overwrite=overwrite) as folder:
        write_other_files(folder, manifest, texts, tokenizer)
        for shard in sorted({entry["file"] for entry in manifest.tensors.values()}):
            part = {n: tensors[n] for n, e in manifest.tensors.items() if e["file"] == shard}
            manifest.files[shard] = write_safetensors(folder / shard, part)
        (folder / MANIFEST).write_text(manifest.to_json(), "utf-8")
    return path


def load_quantized(
    directory: str | Path,
    *,
    device: torch.device | str | int | None = None,
    model: nn.Module | None = None,
    verify: bool = True,
) -> nn.Module:
    """Loads what `save_quantized` wrote. Runs no code from the folder: no pickle, no remote code.

    On the CPU the weights are mapped, not read: memory is taken as they are used, and is shared between processes.

    Args:
        directory: the folder.
        device: where the model goes; None is the CPU.
        model: a float model of the checkpoint's architecture, for classes that transformers does not have. Its
            weights may be on the meta device. It is changed in place and returned; its own weights are dropped.
        verify: compare size and SHA-256 of every file; False skips that, and the whole file is not read up front.

    Returns:
        The model in eval mode, with `smoothquant_info`, computing bit for bit what the saved one does.

    Raises:
        SmoothQuantError: the folder is missing, is not a checkpoint, was altered, is incomplete, was written by a newer
            release, does not fit the model, or has a NaN scale. A model passed in is unchanged then.

    Equivalent to:
        model = AutoModelForCausalLM.from_config(config); swap in the W8A8Linear; model.load_state_dict(tensors)
    """
    folder = Path(directory).expanduser()
    place = _device(device)
    manifest = read_manifest(folder)
    check_files(folder, manifest, verify=verify)
    modules = skeletons.make_modules(manifest)
    skeleton = _rebuild(folder, manifest) if model is None else model
    _check_fit(skeleton, modules, manifest)
    tensors = read(folder, manifest.tensors)
    check_scales(tensors, manifest.modules)
    skeletons.install(skeleton, modules)
    _assign(skeleton, tensors, manifest, place)
    setattr(skeleton, INFO, manifest.info)
    for module, refusal in save_refusals(skeleton):
        module.__dict__.setdefault(HF_QUANTIZER, refusal)
    return skeleton.eval()


# --- saving -----------------------------------------------------------------------------------------------------------


def _describe(
    model: nn.Module, texts: Mapping[str, str], max_shard_bytes: int
) -> tuple[Manifest, dict[str, Tensor]]:
    """The manifest but for its files, and the tensors to write."""
    modules, shared = skeletons.describe_modules(model)
    if not any(isinstance(m, W8A8Linear) for m in model.modules()):
        smoothed = " (it is smoothed, but in float)" if modules or hasattr(model, INFO) else ""
        raise SmoothQuantError(
            f"the model has no quantised layer{smoothed}: run quantize_model on it first, or save a float model with "
            "save_pretrained."
        )
    tensors, tied = unique(skeletons.layer_state(model))
    check_scales(tensors, modules)
    again = constructed_again(model, texts)
    non_persistent = non_persistent_buffers(model, again, tensors.keys() | tied.keys())
    tensors |= non_persistent
    files = assign_files(tensors, max_shard_bytes)
    entries: dict[str, TensorEntry] = {
        name: {"file": files[name], "dtype": dtype_name(t), "shape": list(t.shape)}
        for name, t in tensors.items()
    }
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
    """The model as transformers will make it from config.json; None for a class that transformers does not have."""
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
    """The manifest but for its files; warns if only a model passed to `load_quantized` will be able to take it."""
    cls = type(model)
    manifest = Manifest(
        model={
            "name": cls.__name__,
            "module": cls.__module__,
            "rebuild": True,
            "attention": _attention(model),
        },
        info=getattr(model, INFO, {}),
        modules=modules,
        shared_modules=shared,
        tensors=tensors,
        tied=tied,
        non_persistent=non_persistent,
        files={},
        package_version=package_version(),
    )
    manifest.to_json()  # refuses here, before anything is written, what it will have to refuse
    problem = "transformers does not define its class"
    if again is not None:
        problem = next(skeletons.mismatches(again, skeletons.make_modules(manifest), manifest), "")
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
    """The tokenizer's files and the configuration's, entered into the manifest with what else is there already."""
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    for name, text in texts.items():
        (folder / name).write_text(text, "utf-8")
    weight_map = {name: entry["file"] for name, entry in manifest.tensors.items()}
    if len(set(weight_map.values())) > 1:
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n", "utf-8")
    for file in sorted(folder.rglob("*")):
        name = file.relative_to(folder).as_posix()
        if file.is_file() and name not in manifest.files:
            manifest.files[name] = file_entry(file)


def check_shard_bytes(limit: int) -> None:
    if limit < 1:
        raise SmoothQuantError(f"max_shard_bytes must be at least 1, got {limit}.")


def check_tokenizer(tokenizer: Any) -> None:
    """Raises SmoothQuantError unless it is None or can be saved."""
    if tokenizer is not None and not hasattr(tokenizer, "save_pretrained"):
        raise SmoothQuantError(
            f"tokenizer must have save_pretrained, as those of transformers do; got {type(tokenizer).__name__}."
        )


def config_texts(model: Any) -> dict[str, str]:
    """The files that transformers reads, of a transformers model."""
    texts = {}
    if hasattr(getattr(model, "config", None), "to_json_string"):
        texts[CONFIG] = skeletons.config_json(model)
        if getattr(model, "generation_config", None) is not None:
            texts[GENERATION_CONFIG] = model.generation_config.to_json_string() + "\n"
    return texts


def non_persistent_buffers(
    model: nn.Module, again: nn.Module | None, persistent: Set[str]
) -> dict[str, Tensor]:
    """The buffers outside the state dict, except those that the constructor makes the same."""
    made = dict(again.named_buffers(remove_duplicate=False)) if again is not None else {}
    found = {}
    for name, buffer in model.named_buffers(remove_duplicate=False):
        if name in persistent:
            continue
        value, other = check_storable(name, buffer).cpu(), made.get(name)
        if other is None or other.dtype != value.dtype or not torch.equal(other.cpu(), value):
            found[name] = value
    return found


def package_version() -> str:
    try:
        return version("smoothquant-kernels")
    except PackageNotFoundError:  # run from a source tree that is not installed
        return "unknown"


# --- loading ----------------------------------------------------------------------------------------------------------


def _device(device: torch.device | str | int | None) -> torch.device:
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
    """The transformers model that config.json describes, without weights."""
    name = manifest.model["name"]
    if not manifest.model["rebuild"]:
        raise SmoothQuantError(
            f"the saved model is a {manifest.model['module']}.{name} that transformers cannot make: pass model= with a "
            "float model of that architecture."
        )
    try:
        text = (folder / CONFIG).read_text("utf-8")
        values = json.loads(text)
        architectures = values.get("architectures")
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise SmoothQuantError(
            f"{folder / CONFIG} cannot be read ({error}): copy it again."
        ) from None
    if architectures != [name]:
        raise SmoothQuantError(
            f"{folder / CONFIG} is for {architectures} and the weights are of a {name}: copy it again."
        )
    model: Any = skeletons.build(skeletons.find_class(name), text, manifest.model["attention"])
    model.config.name_or_path = model.name_or_path = str(folder)
    if GENERATION_CONFIG in manifest.files:
        from transformers import GenerationConfig

        try:
            saved = json.loads((folder / GENERATION_CONFIG).read_text("utf-8"))
            values = skeletons.plain_floats(saved)
            # What from_dict makes, transformers 4 cannot generate with.
            model.generation_config = (
                GenerationConfig.from_pretrained(folder)
                if values == saved
                else GenerationConfig.from_dict(values)
            )
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise SmoothQuantError(
                f"{folder / GENERATION_CONFIG} cannot be read ({error}): copy it again."
            ) from error
    return model  # type: ignore[no-any-return]


def _check_fit(model: nn.Module, modules: Mapping[str, nn.Module], manifest: Manifest) -> None:
    """Raises SmoothQuantError unless the checkpoint has each tensor of the model, and no other."""
    name = type(model).__name__
    problems = [f"it is a {name}"] if name != manifest.model["name"] else []
    problems += skeletons.mismatches(model, modules, manifest)
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise SmoothQuantError(
            f"the checkpoint of a {manifest.model['name']} does not fit the model, {problems[0]}{more}: pass a model "
            "of the same class and configuration."
        )


def check_scales(tensors: Mapping[str, Tensor], modules: Iterable[str]) -> None:
    """Raises SmoothQuantError unless every scale and smoothing factor is positive and finite."""
    for name in (f"{module}.{scale}" for module in modules for scale in _SCALES):
        t = tensors.get(name)
        if t is not None and not bool(((t > 0) & t.isfinite()).all()):
            raise SmoothQuantError(
                f"{name} has a value that is NaN, infinite or not positive: quantise the model again."
            )


def _assign(
    model: nn.Module, tensors: Mapping[str, Tensor], manifest: Manifest, device: torch.device
) -> None:
    """Puts the tensors in, ties what was tied, and moves the rest of the model to the device."""
    state = model.state_dict()  # with its metadata: the versions that modules want to see
    placed = {name: aligned(t).to(device) for name, t in tensors.items()}
    placed |= {alias: placed[name] for alias, name in manifest.tied.items()}
    for name in manifest.non_persistent:
        owner, leaf = _owner(model, name)
        owner._buffers[leaf] = placed.pop(name)
    state.update(placed)
    model.load_state_dict(state, assign=True)
    for alias, name in manifest.tied.items():
        # One Parameter again: two that share memory would part ways at the next `.to(dtype)`.
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
    model.to(device)


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    owner, _, leaf = name.rpartition(".")
    return model.get_submodule(owner), leaf
