"""Calibration: the largest magnitude that each input channel of each linear layer reaches on sample data."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from smoothquant_kernels.config import SmoothQuantConfig
from smoothquant_kernels.errors import SmoothQuantError
from smoothquant_kernels.modeling.batches import (
    PositionCounter,
    count_tokens,
    main_entry,
    position_limit,
    run_checked,
    shortened,
    small_batch,
)
from smoothquant_kernels.modeling.hooks import Hooks
from smoothquant_kernels.modeling.run import Batch, evaluating
from smoothquant_kernels.modeling.view import ModelView, check_present
from smoothquant_kernels.nn.experts.source import FloatExperts
from smoothquant_kernels.smoothing.entries import tensors_of
from smoothquant_kernels.smoothing.experts.observe import ExpertRecorder, watched_names
from smoothquant_kernels.smoothing.padding import Padding
from smoothquant_kernels.smoothing.patterns import check_patterns
from smoothquant_kernels.smoothing.statistics import (
    ActivationStatistics,
    of_heads,
    warn_if_short,
)

if TYPE_CHECKING:
    from rich.progress import Progress

CalibrationData = Iterable[Any]


def _to_batches(item: Any, tokenizer: Any, window: int, model: nn.Module | None) -> Iterator[Batch]:
    if isinstance(item, Mapping):
        text = item.get("text")
        if isinstance(text, str) and "input_ids" not in item and tokenizer is not None:
            item = text  # a row of a dataset
        else:
            yield tensors_of(item, model)
            return
    if isinstance(item, (list, tuple)):
        if item and all(isinstance(part, str) for part in item):
            for part in item:
                yield from _to_batches(part, tokenizer, window, model)
            return
        item = _only_member(item)
    elif not isinstance(item, (str, Tensor)) and hasattr(item, "__array__"):
        item = torch.as_tensor(item)
    if isinstance(item, Tensor) and item.dim() >= 1:
        if item.is_floating_point() or item.dim() > 2:
            raise SmoothQuantError(
                f"a calibration tensor must hold token ids [T] or [B, T], got {item.dtype} {tuple(item.shape)}; "
                "pass other inputs as a dict of tensors by name."
            )
        yield {"input_ids": item.long() if item.dim() == 2 else item.long()[None]}
    elif isinstance(item, str):
        if tokenizer is None:
            raise SmoothQuantError("calibration data holds strings: pass tokenizer= as well.")
        ids = torch.as_tensor(tokenizer(item, return_tensors="pt")["input_ids"])[0]
        for start in range(0, len(ids), window):
            yield {"input_ids": ids[None, start : start + window]}
    else:
        raise SmoothQuantError(
            "calibration data must be token-id tensors, dicts of tensors, or strings; "
            f"got {type(item).__name__}."
        )


def _only_member(item: Sequence[Any]) -> Tensor:
    """The tensor that a list or tuple stands for: token ids, or the only tensor of a TensorDataset's batch."""
    if len(item) == 1 and isinstance(item[0], Tensor):
        return item[0]
    if item and all(type(v) is int for v in item):
        return torch.tensor(item)
    kinds = ", ".join(
        f"{v.dtype} {list(v.shape)}".removeprefix("torch.")
        if isinstance(v, Tensor)
        else type(v).__name__
        for v in item[:4]
    )
    raise SmoothQuantError(
        f"a calibration batch is a {type(item).__name__} ({kinds}) whose members have no names: pass a dict, such as "
        "{'input_ids': ids, 'attention_mask': mask}."
    )


def fitting_window(window: int, tokenizer: Any, model: nn.Module | None) -> int:
    """Returns `window`, or the longest length that the model and the tokenizer support if that is shorter."""
    longest = getattr(tokenizer, "model_max_length", None)
    limits = [position_limit(model)[0], longest if isinstance(longest, int) else None]
    return min([window, *(n for n in limits if n is not None and n > 0)])


def calibration_batches(
    data: CalibrationData,
    *,
    tokenizer: Any = None,
    window: int = 512,
    max_tokens: int = 16384,
    model: nn.Module | None = None,
) -> Iterator[Batch]:
    """Yields batches of about `max_tokens` tokens in total from an iterable of any supported items.

    The last batch is cut if it is a single row of text. Any other batch is used whole. A batch without token ids counts
    the positions that the model derives from it (`PositionCounter`), or its rows if there is no model.

    Args:
        data: token-id tensors [T] or [B, T], dicts of tensors (`input_ids`, `attention_mask`, ...), or strings.
        tokenizer: needed for strings.
        window: strings are cut into windows of this many tokens, or of as many as the model and the tokenizer take.
        model: the model that the batches are for. A model without its weights is not run.

    Raises:
        SmoothQuantError: an item is none of these, or the data is a single item (a string, a dict, a tensor [T]).
    """
    if isinstance(data, (str, bytes, Mapping)) or not isinstance(data, Iterable):
        raise SmoothQuantError(
            f"calibration data must be an iterable of batches or strings, got {type(data).__name__}; "
            "put a single one into a list."
        )
    if tokenizer is not None:
        window = fitting_window(window, tokenizer, model)
    empty = model is not None and any(p.is_meta for p in model.parameters())
    count = PositionCounter(None if empty else model)
    left = max_tokens
    for item in data:
        for batch in _to_batches(item, tokenizer, window, model):
            if batch[main_entry(batch)].numel() == 0:
                continue
            tokens = count(batch)
            yield shortened(batch, left, model) if tokens > left else batch
            left -= tokens
            if left <= 0:
                return


def configured_batches(
    model: nn.Module,
    data: CalibrationData,
    config: SmoothQuantConfig,
    tokenizer: Any,
    max_tokens: int | None = None,
) -> Iterator[Batch]:
    """Runs `calibration_batches` with a configuration's window and, unless `max_tokens` is given, its token count."""
    return calibration_batches(
        data,
        tokenizer=tokenizer,
        window=config.calibration_window,
        max_tokens=max_tokens or config.calibration_tokens,
        model=model,
    )


class Recorder:
    """Merges the inputs of `linears` into `statistics`, batch by batch.

    Attributes:
        rows: the most rows of the last batch that one of the linears read in one call, without padding.
    """

    def __init__(
        self,
        statistics: ActivationStatistics,
        linears: Mapping[str, nn.Module],
        model: nn.Module,
        experts: Mapping[str, FloatExperts] | None = None,
    ) -> None:
        self._statistics, self._linears, self._model = statistics, linears, model
        experts = experts or {}
        self._padding = Padding(model, linears, {name: e.module for name, e in experts.items()})
        self._experts = ExpertRecorder(statistics, experts, self._padding)
        self.rows = 0

    def measure(self, batch: Batch, run: Callable[[Batch], Any]) -> Any:
        """Runs a batch, measures all of it but padding, and returns the result of `run`."""
        self._padding.start(batch, run)
        self.rows = 0
        with Hooks(self._model) as hooks:
            for name, module in self._linears.items():
                hooks.on_input(module, partial(self._record, name))
            self._experts.watch(hooks)
            return run(batch)

    def _record(self, name: str, x: Tensor) -> None:
        rows = self._statistics.update(name, x, self._padding.keep(name, x))
        self.rows = max(self.rows, rows)


def calibration_bar(progress: bool) -> Progress:
    """The progress bar of all slow calibration steps."""
    from rich import progress as rich

    columns = (
        rich.TextColumn("{task.description}"),
        rich.BarColumn(),
        rich.MofNCompleteColumn(),
        rich.TimeRemainingColumn(),
    )
    return rich.Progress(*columns, transient=True, disable=not progress)


def collect_statistics(
    model: nn.Module,
    linears: Mapping[str, nn.Module],
    batches: Iterable[Batch],
    *,
    config: SmoothQuantConfig | None = None,
    max_tokens: int | None = None,
    heads: Collection[str] = (),
    progress: bool = True,
    experts: Mapping[str, FloatExperts] | None = None,
) -> ActivationStatistics:
    """Runs the model over the batches and returns the statistics of the inputs of `linears`.

    Args:
        batches: as `calibration_batches` yields them. Padding (attention_mask 0) does not count (`Padding`).
        config: its rotations decide which tokens are kept, and its formats and rounding which layers get moments; the
            default configuration if None.
        max_tokens: the length of the progress bar; nothing else depends on it.
        heads: the output heads among the linears. They read every token, and have their own settings.
        experts: experts to measure, too.

    Raises:
        SmoothQuantError: there is no data, the model refuses a batch, or an input holds NaN or Inf (the message names
            the layer).
    """

    def forward(batch: Batch) -> Any:
        return run_checked(model, batch, logits=bool(heads))

    statistics = ActivationStatistics(
        watched=(*linears, *watched_names(experts or {})),
        config=of_heads(config or SmoothQuantConfig(), heads),
    )
    recorder = Recorder(statistics, linears, model, experts)
    with evaluating(model), calibration_bar(progress) as bar:
        task = bar.add_task("calibrating (tokens)", total=max_tokens)
        for batch in batches:
            recorder.measure(batch, forward)
            if not statistics.sample:
                statistics.sample = small_batch(batch, forward, model)
            count = count_tokens(batch, recorder.rows)
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
        model: a float model; left unchanged.
        data: an iterable of token-id tensors [T] or [B, T], dicts of tensors, or strings (with `tokenizer`). It may be
            endless, because reading stops after `calibration_tokens`.
        config: only `skip`, `quantize_head`, `weight_rounding`, `calibration_tokens`, `calibration_window`, the formats
            and the rotations are used. The rotations decide which tokens are kept; the formats and `weight_rounding`,
            which layers GPTQ can round.
        tokenizer: turns strings into token ids.
        progress: whether to show a progress bar.

    Returns:
        The statistics, which `smooth_lm` takes in place of calibration data. A warning says if the data ended before
        half of `calibration_tokens`.

    Raises:
        SmoothQuantError: no linears, no data, wrong data, or NaN or Inf in an input (the message names the layer).

    Equivalent to:
        for each linear: absmax = torch.stack([x.abs().flatten(0, -2).amax(0) for x in its inputs]).amax(0)

    Source: SmoothQuant (Xiao et al., 2022), section 3.2 ("we use the calibration samples to estimate the scale").
    """
    config = config or SmoothQuantConfig()
    view = ModelView(model, config.float_pattern, config.quantize_head)
    return calibrate_view(view, data, config, tokenizer=tokenizer, progress=progress)


def calibrate_view(
    view: ModelView,
    data: CalibrationData,
    config: SmoothQuantConfig,
    *,
    tokenizer: Any = None,
    progress: bool = True,
) -> ActivationStatistics:
    """Runs `calibrate_model` as a part of a larger operation."""
    model = view.model
    batches = configured_batches(model, data, config, tokenizer)
    check_present(model)
    check_patterns(model, config)
    statistics = collect_statistics(
        model,
        view.linears,
        batches,
        config=config,
        max_tokens=config.calibration_tokens,
        heads=view.int8_heads,
        progress=progress,
        experts=view.experts,
    )
    statistics.asked = config.calibration_tokens
    warn_if_short(statistics.tokens, statistics.asked, stacklevel=4)
    return statistics
