"""What several commands do: read settings, choose a device, find and load models, calibrate."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from smoothquant_kernels import checkpoint, models
from smoothquant_kernels._console import note, quiet_stderr
from smoothquant_kernels._extension import extension_status
from smoothquant_kernels._inspect import is_checkpoint
from smoothquant_kernels.calibrate import calibration_batches, fitting_window
from smoothquant_kernels.config import SmoothQuantConfig
from smoothquant_kernels.errors import SmoothQuantError
from smoothquant_kernels.linear import W8A8Linear, is_float_linear
from smoothquant_kernels.text import token_windows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def read_config(path: Path | None, **changes: Any) -> SmoothQuantConfig:
    """The settings of a file, or the defaults, with those of `changes` that are not None."""
    config = SmoothQuantConfig()
    if path is not None:
        try:
            config = SmoothQuantConfig.from_json(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise SmoothQuantError(f"{path} cannot be read: {error.strerror}.") from error
        except (SmoothQuantError, UnicodeDecodeError) as error:
            raise SmoothQuantError(f"{path}: {error}") from error
    return config.replace(**{k: v for k, v in changes.items() if v is not None})


def choose_dtype(name: str) -> torch.dtype:
    if name not in _DTYPES:
        raise SmoothQuantError(f"dtype must be one of {', '.join(_DTYPES)}; got {name!r}.")
    return _DTYPES[name]


def choose_device(name: str) -> torch.device:
    """`auto` takes a GPU only where the CUDA kernels can run; a device by name must exist."""
    if name == "auto":
        usable = torch.cuda.is_available() and extension_status().available
        return torch.device("cuda" if usable else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise SmoothQuantError(
            f"the device {name!r} cannot be used here ({str(error).splitlines()[0]}); "
            "see `smoothquant-kernels doctor`."
        ) from error
    return device


def check_output(output: Path, *, force: bool) -> None:
    """Finds out, before hours of work, whether the result could be written."""
    if (output.exists() or output.is_symlink()) and not force:
        raise SmoothQuantError(f"{output} exists already; give another name, or --force.")
    if output.exists() and not is_checkpoint(output):
        raise SmoothQuantError(
            f"{output} is not a checkpoint of this package, so --force does not replace it; "
            "give another name."
        )
    check_target(output)


def check_target(output: Path) -> None:
    """Whether a folder can be made there; nothing is left behind."""
    parent = output.absolute().parent
    while not parent.exists():
        parent = parent.parent
    try:
        # Asking for permissions is not enough: a read-only file system grants them to root.
        with tempfile.TemporaryDirectory(dir=parent):
            pass
    except OSError as error:
        raise SmoothQuantError(
            f"{output} cannot be written: {error.strerror} ({parent}); give another place."
        ) from error


def load_any(source: str, *, dtype: str, device: str) -> tuple[Any, bool]:
    """A model in evaluation mode, float or quantised, and whether it is quantised."""
    where = choose_device(device)
    float_type = choose_dtype(dtype)
    note(f"loading {source}")
    if is_checkpoint(Path(source)):
        with quiet_stderr():
            model = checkpoint.load_quantized(Path(source), device=where)
        return model.eval(), True
    with quiet_stderr():
        plain: Any = models.load_model(source, dtype=float_type)
    return plain.to(where), False


def load_tokenizer(source: str, fallback: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a model or checkpoint; one that has none takes that of `fallback`."""
    with quiet_stderr():
        try:
            return models.load_tokenizer(source)
        except SmoothQuantError:
            if fallback is None:
                raise
            return models.load_tokenizer(fallback)


def calibration_windows(
    texts: Sequence[str], tokenizer: Any, config: SmoothQuantConfig, model: nn.Module | None = None
) -> list[Tensor]:
    """Token ids [1, T] for calibration: the texts joined, so that short ones make full windows.

    They are cut to what the tokenizer and the model (if given) take, and hold `calibration_tokens` at most.
    """
    enough, size = [], 0
    for part in texts:  # tokenising a whole corpus for some thousand tokens would take minutes
        enough.append(part)
        size += len(part)
        if size > 32 * config.calibration_tokens:
            break
    windows = token_windows(
        enough,
        tokenizer,
        window=max(2, fitting_window(config.calibration_window, tokenizer, model)),
        max_tokens=config.calibration_tokens,
    )
    ids = [window.input_ids for window in windows]
    # windows overlap, so together they are longer than the text
    batches = calibration_batches(ids, max_tokens=config.calibration_tokens)
    return [batch["input_ids"] for batch in batches]


def tensor_bytes(module: nn.Module) -> int:
    """Bytes of all parameters and buffers, shared ones once."""
    tensors = {t.data_ptr(): t.nbytes for t in (*module.parameters(), *module.buffers())}
    return sum(tensors.values())


def linear_bytes(model: nn.Module, skipped: Sequence[str] = ()) -> int:
    """Bytes of the linears that are quantised, or will be: all but those of the names `skipped`."""
    return sum(
        tensor_bytes(module)
        for name, module in model.named_modules()
        if (isinstance(module, W8A8Linear) or is_float_linear(module)) and name not in skipped
    )
