"""Steps that several commands share: reading settings, choosing a device, finding and loading models."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from smoothquant_kernels.backends.cuda import extension_status
from smoothquant_kernels.checkpoint.foreign_folder import is_compressed_tensors
from smoothquant_kernels.checkpoint.kv_calibration import KV_FILE
from smoothquant_kernels.checkpoint.load import load_quantized
from smoothquant_kernels.checkpoint.manifest import (
    CONFIG,
    MARKERS,
    has_int8_config,
    is_checkpoint,
    read_manifest,
)
from smoothquant_kernels.cli.console import MismatchError, quiet_stderr
from smoothquant_kernels.cli.options import DTYPES, KV_CACHES
from smoothquant_kernels.config import SmoothQuantConfig
from smoothquant_kernels.errors import SmoothQuantError
from smoothquant_kernels.evaluation import models
from smoothquant_kernels.evaluation.architecture import check_causal
from smoothquant_kernels.modeling.view import holds_matrices
from smoothquant_kernels.nn.float_linear import is_float_linear
from smoothquant_kernels.nn.kinds import is_quantized
from smoothquant_kernels.storage.digests import file_entry
from smoothquant_kernels.storage.document import Document, note
from smoothquant_kernels.storage.folder import check_writable, occupant

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def changed_settings(
    *,
    rotation: str | int | None,
    scheme: str | None,
    skip: list[str] | None,
    quantize_head: bool,
    no_smooth: bool,
    **others: Any,
) -> Document:
    """The settings whose options were given; `others` already have the names of settings."""
    changes = {
        **others,
        "rotation": int(str(rotation)) if str(rotation).isdecimal() else rotation,
        "activation_scheme": scheme,
        "skip": tuple(skip) if skip else None,
        "quantize_head": True if quantize_head else None,
        "smooth": False if no_smooth else None,
    }
    return {name: value for name, value in changes.items() if value is not None}


def read_config(path: Path | None, changes: Document) -> SmoothQuantConfig:
    """The settings of a file, or the defaults, overridden by `changes`."""
    config = SmoothQuantConfig()
    if path is not None:
        try:
            config = SmoothQuantConfig.from_json(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise SmoothQuantError(f"{path} cannot be read: {error.strerror}.") from error
        except (SmoothQuantError, UnicodeDecodeError) as error:
            raise SmoothQuantError(f"{path}: {error}") from error
    return config.replace(**changes)


def choose_dtype(name: str) -> torch.dtype:
    if name not in DTYPES:
        raise SmoothQuantError(f"--dtype must be one of {', '.join(DTYPES)}; got {name!r}.")
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def choose_device(name: str) -> torch.device:
    """`auto` takes a GPU only if the CUDA kernels can run; a named device must exist."""
    if name == "auto":
        usable = torch.cuda.is_available() and extension_status().available
        return torch.device("cuda" if usable else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
        if device.type != "meta":
            return device
        reason = "it computes nothing"
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0].split(". ")[0][:200].rstrip(".")
    raise SmoothQuantError(
        f"the device {name!r} cannot be used here ({reason}): give auto, cpu, or a GPU that `smoothquant-kernels "
        "doctor` lists, such as cuda or cuda:1."
    )


def check_output(output: Path, *, force: bool) -> None:
    """Raises SmoothQuantError, before hours of work, if the result cannot be written."""
    found = occupant(output, MARKERS)
    if found in ("file", "other"):
        raise SmoothQuantError(
            f"{output} exists already and is not a checkpoint of this package, so it is not replaced; give another "
            "name."
        )
    if (found or output.is_symlink()) and not force:
        raise SmoothQuantError(f"{output} exists already; give another name, or --force.")
    check_writable(output)


def holds_int8(source: str) -> bool:
    """Whether `load_quantized` loads this folder, or says best why not: ours, or one of compressed-tensors."""
    folder = Path(source)
    return is_checkpoint(folder) or has_int8_config(folder) or is_compressed_tensors(folder)


def config_of(source: str) -> Any:
    """The configuration of a model or checkpoint, without its weights; None if only the weights' file has it."""
    if not holds_int8(source):
        with quiet_stderr():
            return models.load_config(source)
    try:
        values = json.loads((Path(source) / CONFIG).read_text("utf-8"))
        return SimpleNamespace(**values)
    except (OSError, ValueError, TypeError):
        return None  # load_quantized reports what is wrong with it


def load_any(
    source: str, *, dtype: str, device: str, causal: str | None = None, optimize: bool = False
) -> tuple[Any, bool]:
    """A model in evaluation mode, float or quantized, and whether it is quantized.

    `causal` names the command if it needs a causal language model. Any other model is refused before its weights are
    read. So is a float model with `optimize`, which is an argument of `load_quantized`.
    """
    where = choose_device(device)
    float_type = choose_dtype(dtype)
    if causal is not None:
        check_causal(config_of(source), source, causal)
    quantized = holds_int8(source)
    if optimize and not quantized:
        raise SmoothQuantError(
            f"--optimize needs a quantized model, and {source} is a float model: quantize it first, or leave out "
            "--optimize."
        )
    note(f"loading {source}")
    if quantized:
        with quiet_stderr():
            model = load_quantized(Path(source), device=where, optimize=optimize)
        return model.eval(), True
    with quiet_stderr():
        plain: Any = models.load_model(source, dtype=float_type)
    return plain.to(where), False


def check_kv_cache(name: str | None, source: str) -> None:
    """Raises SmoothQuantError, before the weights are read, unless there is such a cache for this model."""
    if name is None:
        return
    if name not in KV_CACHES:
        raise SmoothQuantError(f"--kv-cache must be {' or '.join(KV_CACHES)}; got {name!r}.")
    if name == KV_CACHES[1] and not (Path(source) / KV_FILE).is_file():
        what = "was quantized without" if holds_int8(source) else "is a float model, without"
        raise SmoothQuantError(
            f"{source} {what} the calibration that static scales come from: run `smoothquant-kernels quantize MODEL "
            "--output DIR --kv-cache int8-static` and give DIR, or give --kv-cache int8."
        )


def kv_cache_maker(model: Any, name: str) -> Callable[[], Any]:
    """Returns a function that makes empty caches of a kind. The model's attention reads them as int8 if it can."""
    from smoothquant_kernels.kv_cache.attention import use_int8_attention
    from smoothquant_kernels.kv_cache.cache import Int8KVCache

    scheme = "per_token" if name == KV_CACHES[0] else "static"
    Int8KVCache(model, scheme=scheme)  # raises early
    try:
        with quiet_stderr():
            use_int8_attention(model)
    except (SmoothQuantError, ValueError):
        note(f"the attention of {type(model).__name__} reads the int8 cache as float tensors")
    return lambda: Int8KVCache(model, scheme=scheme)


def load_tokenizer(source: str, fallback: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a model or checkpoint, or that of `fallback` if it has none."""
    with quiet_stderr():
        try:
            return models.load_tokenizer(source)
        except SmoothQuantError:
            if fallback is None:
                raise
            return models.load_tokenizer(fallback)


def tensor_bytes(module: nn.Module) -> int:
    """Bytes of all parameters and buffers; shared ones count once."""
    tensors = {t.data_ptr(): t.nbytes for t in (*module.parameters(), *module.buffers())}
    return sum(tensors.values())


def linear_bytes(model: nn.Module, skipped: Sequence[str] = ()) -> int:
    """Bytes of the linears and experts that are or will be quantized: all but those named in `skipped`."""
    return sum(
        tensor_bytes(module)
        for name, module in model.named_modules()
        if (is_quantized(module) or is_float_linear(module) or holds_matrices(module))
        and name not in skipped
    )


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a checkpoint."""
    return sorted(directory.glob("*.safetensors"))


def verify_checkpoint(directory: Path) -> None:
    """Compares the size and digest of every file with the manifest.

    Raises:
        MismatchError: a file is missing or differs from what was saved; the message names each one.
        SmoothQuantError: it is not a checkpoint.
    """
    if not is_checkpoint(directory):
        read_manifest(directory)  # raises the reason
    try:
        manifest = read_manifest(directory)
    except SmoothQuantError as error:
        raise MismatchError(str(error)) from error
    wrong = []
    for name, entry in manifest.files.items():
        path = directory / name
        if not path.is_file():
            wrong.append(f"{path} is missing")
        elif (size := path.stat().st_size) != entry["size"]:
            wrong.append(f"{path} has {size} bytes and was saved with {entry['size']}")
        elif file_entry(path)["sha256"] != entry["sha256"]:
            wrong.append(f"{path} is not what was saved (its SHA-256 differs)")
    if wrong:
        raise MismatchError(f"{'; '.join(wrong)}: copy or download the checkpoint again.")
