"""Calibration: the largest magnitude that each input channel of each linear layer reaches on sample data."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from smoothquant_kernels.config import SmoothQuantConfig
from smoothquant_kernels.errors import SmoothQuantError
from smoothquant_kernels.modules import Batch, evaluating, partition_linears, run

CalibrationData = Iterable[Any]
_PEAK_TOKENS = 4096  # whose sizes are kept; enough for a median
_SAMPLE_TOKENS = (
    32  # enough to tell structures apart; tracing keeps the inputs of every linear for them
)


@dataclass
class ActivationStatistics:
    """Running statistics of the inputs of linear layers.

    Attributes:
        absmax: module name -> [K] float32 largest |x| per channel over all tokens that are not padding.
        token_absmax: module name -> float32 largest |x| of each of the first few thousand tokens.
        tokens: how many tokens were seen.
        sample: a small batch of the data, on which structure is found and folds are verified.
    """

    absmax: dict[str, Tensor] = field(default_factory=dict)
    token_absmax: dict[str, Tensor] = field(default_factory=dict)
    tokens: int = 0
    sample: Batch = field(default_factory=dict)

    def update(self, name: str, x: Tensor, mask: Tensor | None) -> None:
        """Merges the input x [..., K] of one call; `mask` (bool, one value a token) leaves padding out."""
        rows = x.detach().reshape(-1, x.shape[-1])
        if mask is not None and mask.numel() == rows.shape[0]:
            rows = rows[mask.reshape(-1).to(rows.device)]
        if not rows.shape[0]:
            return
        magnitude = rows.abs()
        absmax = magnitude.amax(0).float()  # exact: a maximum does not round
        old = self.absmax.get(name)
        self.absmax[name] = absmax if old is None else torch.maximum(old, absmax)
        seen = self.token_absmax.get(name, absmax.new_empty(0))
        tokens = magnitude[: _PEAK_TOKENS - len(seen)].amax(1).float()
        self.token_absmax[name] = torch.cat([seen, tokens])

    def peak(self, name: str) -> float:
        """The largest token over the median token of a layer's input, by their largest elements; 1 if all are zero."""
        tokens = self.token_absmax[name]
        median = tokens[tokens > 0].median() if bool((tokens > 0).any()) else tokens.new_ones(())
        return max(1.0, float(self.absmax[name].max() / median))

    def check_finite(self) -> None:
        """Raises SmoothQuantError naming the first layer (in calling order) that saw NaN or Inf."""
        for name, absmax in self.absmax.items():
            bad = int((~absmax.isfinite()).sum())
            if bad:
                raise SmoothQuantError(
                    f"calibration found NaN or Inf in the input of layer {name} ({bad} of {absmax.numel()} channels); "
                    "check the checkpoint, or calibrate in a wider dtype (bfloat16 or float32)."
                )


def _small(batch: Batch) -> Batch:
    """The first row and the first few tokens of a batch of token ids; other inputs are taken whole."""
    if "input_ids" not in batch:
        return batch
    shape = batch["input_ids"].shape
    return {k: v[:1, :_SAMPLE_TOKENS] if v.shape[:2] == shape[:2] else v for k, v in batch.items()}


def _to_batches(item: Any, tokenizer: Any, window: int) -> Iterator[Batch]:
    if isinstance(item, Mapping):
        batch = {k: v for k, v in item.items() if isinstance(v, Tensor)}
        if not batch:
            raise SmoothQuantError(
                f"a calibration batch must hold tensors, got a mapping with {sorted(map(str, item))}."
            )
        yield {k: v[None] if v.dim() == 1 else v for k, v in batch.items()}
    elif isinstance(item, Tensor) and item.dim() >= 1:
        if item.is_floating_point() or item.dim() > 2:
            raise SmoothQuantError(
                f"a calibration tensor must hold token ids [T] or [B, T], got {item.dtype} {tuple(item.shape)}; "
                "pass other inputs as a dict of tensors by name."
            )
        yield {"input_ids": item.long() if item.dim() == 2 else item.long()[None]}
    elif isinstance(item, str):
        if tokenizer is None:
            raise SmoothQuantError("calibration data holds strings: pass tokenizer= as well.")
        ids = tokenizer(item, return_tensors="pt")["input_ids"][0]
        for start in range(0, len(ids), window):
            yield {"input_ids": ids[None, start : start + window]}
    else:
        raise SmoothQuantError(
            "calibration data must be token-id tensors, dicts of tensors, or strings; "
            f"got {type(item).__name__}."
        )


def calibration_batches(
    data: CalibrationData, *, tokenizer: Any = None, window: int = 512, max_tokens: int = 16384
) -> Iterator[Batch]:
    """Batches of at most `max_tokens` tokens in all (the last one is cut), from any iterable of what users have.

    Args:
        data: token-id tensors [T] or [B, T], dicts of tensors (`input_ids`, `attention_mask`, ...), or strings.
        tokenizer: needed for strings.
        window: strings are cut into windows of this many tokens.

    Raises:
        SmoothQuantError: an item is none of these, or a single string or tensor was passed as the data.
    """
    if isinstance(data, (str, bytes, Mapping)) or not isinstance(data, Iterable):
        raise SmoothQuantError(
            f"calibration data must be an iterable of batches or strings, got {type(data).__name__}; "
            "put a single one into a list."
        )
    left = max_tokens
    for item in data:
        for batch in _to_batches(item, tokenizer, window):
            ids = batch.get("input_ids")
            if ids is None or ids.dim() != 2:
                yield batch
                continue
            tokens = (
                int(batch["attention_mask"].sum()) if "attention_mask" in batch else ids.numel()
            )
            if ids.numel() == 0:
                continue
            if tokens > left and ids.shape[0] == 1:
                length = ids.shape[1]
                batch = {
                    k: v[:, :left] if v.dim() == 2 and v.shape[1] == length else v
                    for k, v in batch.items()
                }
            yield batch
            left -= tokens
            if left <= 0:
                return


def collect_statistics(
    model: nn.Module,
    linears: Mapping[str, nn.Module],
    batches: Iterable[Batch],
    *,
    max_tokens: int | None = None,
    progress: bool = True,
) -> ActivationStatistics:
    """Runs the model over the batches and returns per-channel maxima of the inputs of `linears`.

    Args:
        batches: as `calibration_batches` yields them; padding (attention_mask 0) does not count.
        max_tokens: only for the length of the progress bar.

    Raises:
        SmoothQuantError: there was no data, or an input held NaN or Inf (the layer is named).
    """
    statistics = ActivationStatistics()
    mask: Tensor | None = None

    def record(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            statistics.update(name, x, mask)

        return hook

    handles = [
        module.register_forward_pre_hook(record(name), with_kwargs=True)
        for name, module in linears.items()
    ]
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    try:
        with evaluating(model), Progress(*columns, transient=True, disable=not progress) as bar:
            task = bar.add_task("calibrating (tokens)", total=max_tokens)
            for batch in batches:
                attention = batch.get("attention_mask")
                if not statistics.sample:
                    statistics.sample = _small(batch)
                mask = attention.bool() if attention is not None and attention.dim() == 2 else None
                run(model, batch, logits=False)
                ids = batch.get("input_ids")
                seen = mask if mask is not None else ids
                count = 0 if seen is None else int(seen.sum() if seen is mask else seen.numel())
                statistics.tokens += count
                bar.advance(task, count)
    finally:
        for handle in handles:
            handle.remove()
    if not statistics.absmax:
        raise SmoothQuantError(
            "the calibration data is empty: give at least one batch or string with tokens."
        )
    statistics.check_finite()
    return statistics


def calibrate_model(
    model: nn.Module,
    data: CalibrationData,
    config: SmoothQuantConfig | None = None,
    *,
    tokenizer: Any = None,
    progress: bool = True,
) -> ActivationStatistics:
    """Measures a float model once, for any number of `smooth_lm` calls on copies of it.

    Args:
        model: a float model; it is left unchanged.
        data: token-id tensors [T] or [B, T], dicts of tensors, or strings (with `tokenizer`); any iterable.
        config: `skip`, `calibration_tokens` and `calibration_window` are used.
        tokenizer: turns strings into token ids.
        progress: show a progress bar.

    Returns:
        The statistics, to be passed to `smooth_lm` in place of calibration data.

    Raises:
        SmoothQuantError: no linears, no data, wrong data, or NaN or Inf in an input (the layer is named).

    Equivalent to:
        for each linear: absmax = torch.stack([x.abs().flatten(0, -2).amax(0) for x in its inputs]).amax(0)

    Source: SmoothQuant (Xiao et al., 2022), section 3.2 ("we use the calibration samples to estimate the scale").
    """
    config = config or SmoothQuantConfig()
    batches = calibration_batches(
        data,
        tokenizer=tokenizer,
        window=config.calibration_window,
        max_tokens=config.calibration_tokens,
    )
    linears, _ = partition_linears(model, config.skip)
    return collect_statistics(
        model, linears, batches, max_tokens=config.calibration_tokens, progress=progress
    )
