"""One `from_pretrained` of a quantized model: what happens before and after transformers reads the tensors.

This module imports transformers, so import it late.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.quantizers.base import HfQuantizer

from smoothquant_kernels.checkpoint import load
from smoothquant_kernels.checkpoint import skeleton as skeletons
from smoothquant_kernels.checkpoint.hf_config import Config
from smoothquant_kernels.checkpoint.kv_calibration import KV_FILE, load_calibration
from smoothquant_kernels.checkpoint.manifest import INDEX, Manifest, check_files, read_manifest
from smoothquant_kernels.errors import SmoothQuantError
from smoothquant_kernels.modeling.record import attach_info
from smoothquant_kernels.nn import kinds
from smoothquant_kernels.nn.float_linear import is_float_linear
from smoothquant_kernels.ops.checks import FLOATS
from smoothquant_kernels.storage.safetensors import NAMES, align_tensors, read, read_header

#: The attribute of a transformers model with patterns of tensors in the files that need no warning.
_IGNORE = "_keys_to_ignore_on_load_unexpected"
#: Whether transformers tells a quantizer which tensors are missing, as release 4 does.
KNOWS_MISSING = hasattr(HfQuantizer, "update_missing_keys")
_HALF = (torch.float16, torch.bfloat16)


def weights_and_attention(described: Config, config: Any) -> tuple[str | None, str | None]:
    """The name of the weight file or of the index, if it is not that of `save_pretrained`, and the attention."""
    if described.modules is not None:
        name = described.weights
        if name is not None and (type(name) is not str or Path(name).name != name):
            raise SmoothQuantError(
                f"the weight file {name!r} that config.json names is not a name in its folder: copy it again."
            )
        return name, described.attention
    # An earlier release wrote the folder, whose path only the Auto classes have noted by now.
    if not config._name_or_path:
        raise SmoothQuantError(
            "an earlier release wrote this checkpoint: load it by an Auto class of transformers or by load_quantized, "
            "or save it again."
        )
    manifest = read_manifest(Path(config._name_or_path))
    files = {entry["file"] for entry in manifest.tensors.values()}
    if len(files) > 1 and INDEX not in manifest.files:
        raise SmoothQuantError(
            f"from_pretrained needs {INDEX} for the {len(files)} weight files of this checkpoint, which an earlier "
            "release wrote without: use load_quantized, or save it again."
        )
    return files.pop() if len(files) == 1 else INDEX, manifest.model["attention"]


class Loading:
    """Installs the quantized layers on construction, before transformers looks for tensors, and finishes them later.

    Args:
        described: what config.json says.
        model: made from config.json, with its parameters on the meta device.
        files: the weight files; None if transformers does not say.

    Raises:
        SmoothQuantError: the checkpoint does not fit the model, was altered, or the type asked for cannot be used.
    """

    def __init__(self, described: Config, model: Any, files: list[str] | None) -> None:
        self.manifest: Manifest | None = None
        if described.modules is None or described.weights is not None:
            self.folder = Path(files[0]).parent if files else Path(model.config._name_or_path)
            self.manifest = _manifest_for(model, self.folder)
            described = _as_config(self.manifest, described.dtype)
        described.check()
        self.info: dict[str, Any] = described.smoothquant_info or {}
        self._choose_types(described, model)
        rename = _renaming(model)
        modules = {rename(n): (n, values) for n, values in described.modules.items()}
        shared = {rename(a): rename(n) for a, n in (described.shared_modules or {}).items()}
        self.layers = {
            name: skeletons.make_module(old, self._arguments(name, values))
            for name, (old, values) in modules.items()
            if name is not None
        }
        self.aliases = {a: self.layers[n] for a, n in shared.items() if a and n}
        if problem := next(skeletons.module_mismatches(model, self.layers | self.aliases), None):
            raise SmoothQuantError(
                f"the checkpoint does not fit the {type(model).__name__}, {problem}: use the config.json that was "
                "saved with the weights."
            )
        skeletons.install(model, self.layers)
        for parent in model.modules():
            if KNOWS_MISSING and any(map(kinds.is_quantized, parent.children())):
                parent._is_hf_initialized = (
                    True  # transformers 4 would initialize its linears' weights
                )
        for alias in self.aliases:
            # No file has tensors of this name, and transformers would make random ones.
            _put(model, alias, nn.Identity())
        self.types = {
            name: dtype
            for old, value in (described.types or {}).items()
            if (name := rename(old)) and (dtype := skeletons.float_dtype(value))
        }
        self._set_types(model)
        self._ignore(model, [*described.modules, *(described.shared_modules or {}), *self.layers])
        self.floats = {name for name, m in model.named_modules() if is_float_linear(m)}
        for file in files or ():
            if file.endswith(".safetensors"):
                entries = read_header(Path(file))[0]
                parts = {name: name.rpartition(".") for name in entries}
                self._check_header(
                    {f"{rename(o)}.{leaf}": entries[name] for name, (o, _, leaf) in parts.items()}
                )

    def _choose_types(self, described: Config, model: Any) -> None:
        self.own = skeletons.float_dtype(described.dtype)
        self.asked: Any = model.config.dtype or self.own
        if self.asked != self.own and self.asked not in (*_HALF, torch.float32):
            raise SmoothQuantError(
                f"a quantized model cannot be loaded as {self.asked}: pass float16, bfloat16 or float32 as the dtype, "
                'or "auto" for that of the checkpoint.'
            )
        # The same rule as in transformers.
        kept = list(model._keep_in_fp32_modules_strict or ()) if self.asked in _HALF else []
        kept += list(model._keep_in_fp32_modules or ()) if self.asked == torch.float16 else []
        self.kept = re.compile("|".join(rf"(^|\.){name}($|\.)" for name in kept)) if kept else None

    def _type_of(self, name: str) -> torch.dtype:
        """The type of a parameter that is converted."""
        return torch.float32 if self.kept and self.kept.search(name) else self.asked

    def _arguments(self, name: str, values: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a layer, which shows the type that a float layer would have."""
        if self.asked == self.own or "dtype" not in values:
            return values
        return {**values, "dtype": str(self._type_of(name)).removeprefix("torch.")}

    def _set_types(self, model: nn.Module) -> None:
        """Gives every float tensor outside the layers its type: that of the checkpoint, or the one asked for."""
        for name, t, persistent in skeletons.float_tensors(model):
            dtype = self.types.get(name, self.own if persistent else t.dtype)
            if self.asked != self.own:
                follows = isinstance(t, nn.Parameter) or (persistent and dtype == self.own)
                dtype = self._type_of(name) if follows else t.dtype
            if dtype is not None and t.dtype != dtype:
                t.data = t.data.to(dtype)

    def _ignore(self, model: nn.Module, names: Iterable[str]) -> None:
        """Names the tensors of the files that the model has no place for, and that need no warning."""
        markers = {m for kind in kinds.KINDS for m in kind.markers}
        extra = [f"{name}.{marker}" for name in dict.fromkeys(names) for marker in markers]
        extra += self.manifest.non_persistent if self.manifest else []
        self.ignored = re.compile(rf"(^|\.)({'|'.join(map(re.escape, extra))})$")
        self.had = model.__dict__.get(_IGNORE)
        setattr(model, _IGNORE, {*(getattr(model, _IGNORE, None) or ()), self.ignored.pattern})

    def refuse_missing(self, missing: Iterable[str]) -> None:
        """Raises SmoothQuantError if one of the tensors is one of a quantized layer."""
        for name in missing:
            if name.rpartition(".")[0] in self.layers:
                raise SmoothQuantError(
                    f"the checkpoint has no int8 tensor {name}, which its config.json describes: copy it again, or "
                    "quantize the float model again."
                )

    def refuse_unexpected(self, names: Iterable[str]) -> None:
        """Raises SmoothQuantError if one is of an int8 layer that is not described, or not with such a tensor."""
        signs = {scale for kind in kinds.KINDS for scale in kind.scales}
        for name in names:
            owner, _, leaf = name.rpartition(".")
            if owner in self.layers:
                strange = leaf not in _own(self.layers[owner]) and not self.ignored.search(name)
            else:
                strange = owner in self.floats and leaf in signs
            if strange:
                raise SmoothQuantError(
                    f"the checkpoint has {name}, which its config.json does not describe: use the config.json that was "
                    "saved with the weights."
                )

    def _check_header(self, entries: dict[str, dict[str, Any]]) -> None:
        """Checks what a file has of the layers. transformers would convert types, and may not compare shapes."""
        self.refuse_unexpected(entries)
        for name, entry in entries.items():
            owner, _, leaf = name.rpartition(".")
            want = _own(self.layers[owner]).get(leaf) if owner in self.layers else None
            if want is None:
                continue
            kind = kinds.kind_of(self.layers[owner])
            if kind and leaf in kind.floats and entry["dtype"] in map(NAMES.get, FLOATS):
                want = want.to(
                    next(t for t in FLOATS if NAMES[t] == entry["dtype"])
                )  # converted later
            wanted = f"{NAMES[want.dtype]} {list(want.shape)}"
            found = f"{entry['dtype']} {entry['shape']}"
            if found != wanted:
                raise SmoothQuantError(
                    f"{name} in the checkpoint is {found}, not {wanted}: copy it again."
                )

    def finish(self, model: Any) -> None:
        """Checks what transformers has read and completes it: shared modules, types, the kernels' layout."""
        model.__dict__.pop(_IGNORE, None)
        if self.had is not None:
            setattr(model, _IGNORE, self.had)
        self._refuse_unread()
        for alias, layer in self.aliases.items():
            _put(model, alias, layer)
        for layer in self.layers.values():
            layer._apply(lambda t: t)  # makes the layout that the kernels of the device read
        if self.manifest is not None:
            self._read_exactly(model, self.manifest)
            if KV_FILE in self.manifest.files:
                load_calibration(self.folder, model)
        self._check_values()
        self._set_types(model)
        align_tensors(model)
        if self.info:
            attach_info(model, self.info)
        for config in skeletons.configurations(model):
            for name in ("transformers_weights", "_pre_quantization_dtype"):
                vars(config).pop(name, None)
        model.config.dtype = model.dtype

    def _tensors(self) -> dict[str, Tensor]:
        """The tensors of the layers, without those that accelerate moves at run time, if they are not in memory."""
        return {
            f"{name}.{key}": t
            for name, layer in self.layers.items()
            for key, t in (*layer.named_parameters(), *layer.named_buffers())
            if not (t.is_meta and hasattr(layer, "_hf_hook"))
        }

    def _refuse_unread(self) -> None:
        # transformers 5 marks what it reads, and accelerate's hooks, which come later, may copy it without the mark.
        if not KNOWS_MISSING:
            self.refuse_missing(
                name
                for name, t in self._tensors().items()
                if not getattr(t, "_is_hf_initialized", False)
                and not hasattr(self.layers[name.rpartition(".")[0]], "_hf_hook")
            )

    def _check_values(self) -> None:
        described = {name: kinds.describe(layer) for name, layer in self.layers.items()}
        tensors = self._tensors()
        for name, arguments in described.items():
            for key, t in skeletons.make_module(name, arguments).state_dict().items():
                found = tensors.get(f"{name}.{key}", t)
                if found.dtype != t.dtype:
                    raise SmoothQuantError(
                        f"{name}.{key} in the checkpoint is {found.dtype}, not {t.dtype}: copy it again."
                    )
        skeletons.check_scales(tensors, described)

    def _read_exactly(self, model: nn.Module, manifest: Manifest) -> None:
        """Reads the tensors again: their types, what is tied, and the buffers outside the state dict."""
        tensors = read(self.folder, manifest.tensors)  # maps the files
        if any(t.is_meta for t in (*model.parameters(), *model.buffers())):  # offloaded
            tensors = {name: tensors[name] for name in manifest.non_persistent}
        else:
            made = skeletons.make_modules(manifest.modules, manifest.shared_modules)
            load.check_fit(model, made, manifest)
        load.assign(model, tensors, manifest, None)


def _manifest_for(model: nn.Module, folder: Path) -> Manifest:
    manifest = read_manifest(folder)
    if type(model).__name__ != manifest.model["name"]:
        raise SmoothQuantError(
            f"{folder} holds a {manifest.model['name']} and a {type(model).__name__} was asked for: use "
            "the class of the checkpoint."
        )
    check_files(folder, manifest, verify=True)
    return manifest


def _as_config(manifest: Manifest, dtype: str | None) -> Config:
    """What config.json of `save_pretrained` would say. That of an earlier release has no type."""
    inside = tuple(f"{name}." for name in [*manifest.modules, *manifest.shared_modules])
    types = {
        name: entry["dtype"]
        for name, entry in manifest.tensors.items()
        if not name.startswith(inside)
    }
    types |= {alias: types[name] for alias, name in manifest.tied.items() if name in types}
    types = {name: t for name, t in types.items() if skeletons.float_dtype(t)}
    return Config(
        modules=manifest.modules,
        shared_modules=manifest.shared_modules,
        smoothquant_info=manifest.info,
        dtype=dtype or next(iter(types.values()), "float32"),
        types=types,
    )


def _renaming(model: Any) -> Callable[[str], str | None]:
    """The name in the model of a name in the checkpoint; None for what the model lacks.

    transformers loads a base model from the checkpoint of a model with a head, and the other way round.
    """
    names = {n for n, _ in model.named_modules(remove_duplicate=False)} | set(model.state_dict())
    names |= {n for n, _ in model.named_buffers(remove_duplicate=False)}
    prefix = f"{model.base_model_prefix}."
    same = type(model).__name__ in (model.config.architectures or ())

    def rename(name: str) -> str | None:
        tries = (name, name.removeprefix(prefix), prefix + name)
        return next((t for t in tries if t in names), name if same else None)

    return rename


def _own(layer: nn.Module) -> dict[str, Tensor]:
    """The tensors of a layer by name."""
    return {**dict(layer.named_parameters()), **dict(layer.named_buffers())}


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
