"""Calibration: the largest magnitude that each input channel of each linear layer reaches on sample data."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from smoothquant_kernels._patterns import check_patterns
from smoothquant_kernels._statistics import ActivationStatistics as ActivationStatistics
from smoothquant_kernels.config import SmoothQuantConfig
from smoothquant_kernels.errors import SmoothQuantError
from smoothquant_kernels.modules import (
    Batch,
    check_present,
    evaluating,
    partition_linears,
    run,
    token_mask,
)

CalibrationData = Iterable[Any]
_SAMPLE_TOKENS = (
    32  # enough to tell structures apart; tracing keeps the inputs of every linear for them
)


def small_batch(batch: Batch) -> Batch:
    """The first row and the first few tokens of a batch of token ids; other inputs keep their length."""
    if "input_ids" not in batch:
        return batch
    shape = batch["input_ids"].shape

    def cut(v: Tensor) -> Tensor:
        if v.shape[:2] == shape[:2]:
            return v[:1, :_SAMPLE_TOKENS]
        if v.dim() == 4 and v.shape[-2:] == (shape[1], shape[1]):  # a mask [B, 1, T, T]
            return v[:1, :, :_SAMPLE_TOKENS, :_SAMPLE_TOKENS]
        return v[:1] if v.shape[:1] == shape[:1] else v  # images, decoder tokens of another length

    return {k: cut(v) for k, v in batch.items()}


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
            tokens = count_tokens(batch)
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


class Recorder:
    """Forward hooks that merge the inputs of `linears` into `statistics`, for the time of a `with` block.

    Attributes:
        mask: of the batch that runs, from `attention_mask`; None counts all tokens.
    """

    def __init__(self, statistics: ActivationStatistics, linears: Mapping[str, nn.Module]) -> None:
        self._statistics, self._linears = statistics, linears
        self._handles: list[Any] = []
        self.mask: Tensor | None = None

    def __enter__(self) -> Recorder:
        def record(name: str) -> Any:
            def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                x = args[0] if args else next(iter(kwargs.values()))
                self._statistics.update(name, x, self.mask)

            return hook

        self._handles = [
            module.register_forward_pre_hook(record(name), with_kwargs=True)
            for name, module in self._linears.items()
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def start(self, batch: Batch) -> None:
        """Says which batch runs next: its padding is not measured."""
        self.mask = token_mask(batch)


def count_tokens(batch: Batch) -> int:
    """Tokens of a batch that are not padding; 0 where it holds no token ids."""
    if (mask := token_mask(batch)) is not None:
        return int(mask.sum())
    return batch["input_ids"].numel() if "input_ids" in batch else 0


def calibration_bar(progress: bool) -> Progress:
    """The bar that all slow steps of calibration show."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*columns, transient=True, disable=not progress)


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
    statistics = ActivationStatistics(watched=tuple(linears))
    recorder = Recorder(statistics, linears)
    with recorder, evaluating(model), calibration_bar(progress) as bar:
        task = bar.add_task("calibrating (tokens)", total=max_tokens)
        for batch in batches:
            if not statistics.sample:
                statistics.sample = small_batch(batch)
            recorder.start(batch)
            run(model, batch, logits=False)
            count = count_tokens(batch)
            statistics.tokens += count
            bar.advance(task, count)
    statistics.check_not_empty()
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
    check_present(model)
    check_patterns(model, config)
    linears, _ = partition_linears(model, config.skip)
    return collect_statistics(
        model, linears, batches, max_tokens=config.calibration_tokens, progress=progress
    )
