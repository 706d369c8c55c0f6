"""Makes inputs for a model when the caller gives none: just enough to see what reads what."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from smoothquant_kernels.modeling.run import Batch, evaluating, run
from smoothquant_kernels.nn.float_linear import is_float_linear, weight_of

_TOKENS = 8
_REPEATS = 8
_SAMPLES = 4000  # samples of a waveform


def runnable_batch(model: nn.Module) -> Batch | None:
    """Returns a batch of random input that the model accepts, or None. Runs the model once for each batch it tries.

    The model's mode and the global random state do not change.
    """
    if any(p.is_meta for p in model.parameters()):
        return None
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.is_cuda})
    with evaluating(model), torch.random.fork_rng(devices):
        for batch in _candidates(model):
            try:
                run(model, batch)
            except Exception:  # a model may raise anything on wrong input
                continue
            return batch
    return None


def repeated(model: nn.Module, batch: Batch) -> Batch | None:
    """Returns the batch with its tokens repeated, for paths that only long inputs take, or None if it has no tokens.

    The model may refuse it, because its positions are limited.
    """
    ids = batch.get("input_ids")
    if ids is None or ids.dim() != 2 or not getattr(model, "takes_any_length", True):
        return None
    return {
        k: v.repeat(1, _REPEATS, *[1] * (v.dim() - 2)) if v.shape[:2] == ids.shape else v
        for k, v in batch.items()
    }


def _candidates(model: nn.Module) -> Iterator[Batch]:
    required, accepted = _arguments(model)
    entries = {name: make for name in accepted if (make := _known(model, name)) is not None}
    main = getattr(model, "main_input_name", None)
    if main in entries or entries.keys() & {"input_ids", "pixel_values", "input_features"}:
        first = main if main in entries else next(iter(entries))
        batch = {first: entries[first]}
        yield batch
        batch = {**batch, **{n: entries[n] for n in ("decoder_input_ids",) if n in entries}}
        yield batch
        yield {**batch, **{n: entries[n] for n in required if n in entries}}
        yield entries
    for guess in _guesses(model):
        yield dict.fromkeys(required or accepted[:1], guess)


def _arguments(model: nn.Module) -> tuple[list[str], list[str]]:
    """The names of the required arguments of `forward`, and of all its arguments."""
    parameters = [
        p
        for p in inspect.signature(model.forward).parameters.values()
        if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    ]
    return [p.name for p in parameters if p.default is p.empty], [p.name for p in parameters]


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _floats(model: nn.Module, *shape: int) -> Tensor:
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    return torch.randn(*shape, generator=_generator()).to(dtype)


def _ids(model: nn.Module) -> Tensor:
    sizes = [m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)]
    config = getattr(model, "config", None)
    vocabulary = getattr(config, "vocab_size", None) or max(sizes, default=2)
    return torch.randint(0, int(vocabulary), (1, _TOKENS), generator=_generator())


def _setting(model: nn.Module, *names: str, default: int) -> int:
    """A number from the model's configuration, or from that of its vision, audio or text part."""
    config: Any = getattr(model, "config", None)
    parts = [config, *(getattr(config, f"{p}_config", None) for p in ("vision", "audio", "text"))]
    for part in parts:
        for name in names:
            value = getattr(part, name, None)
            if isinstance(value, (list, tuple)) and value:
                value = value[0]
            if isinstance(value, int) and not isinstance(value, bool):
                return value
    return default


def _known(model: nn.Module, name: str) -> Tensor | None:
    """An input for a name that has a meaning in transformers, else None."""
    if name in ("input_ids", "decoder_input_ids"):
        return _ids(model)
    if name == "pixel_values":
        size = _setting(model, "image_size", default=224)
        return _floats(model, 1, _setting(model, "num_channels", default=3), size, size)
    if name == "input_features":
        bands = _setting(model, "num_mel_bins", "feature_size", default=80)
        return _floats(model, 1, bands, 2 * _setting(model, "max_source_positions", default=1500))
    return _floats(model, 1, _SAMPLES) if name == "input_values" else None


def _guesses(model: nn.Module) -> Iterator[Tensor]:
    """Inputs for any module: ids if it embeds, numbers as wide as its first linears, images if it convolves."""
    if any(isinstance(m, nn.Embedding) for m in model.modules()):
        yield _ids(model)
    widths = [weight_of(m).shape[1] for m in model.modules() if is_float_linear(m)]
    for width in dict.fromkeys(widths[:4]):
        yield _floats(model, 2, 4, width)
        yield _floats(model, 4, width)
    if any(isinstance(m, nn.Conv2d) for m in model.modules()):
        yield _floats(model, 1, 3, 32, 32)
        yield _floats(model, 1, 3, 224, 224)
