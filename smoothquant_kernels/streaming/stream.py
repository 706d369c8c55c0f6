"""Quantizes a checkpoint that is larger than memory, with one block's weights in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from smoothquant_kernels.checkpoint.compressed_tensors import export as exports
from smoothquant_kernels.checkpoint.manifest import MARKERS
from smoothquant_kernels.checkpoint.save import (
    MAX_SHARD_BYTES,
    NATIVE,
    check_format,
    check_shard_bytes,
    check_tokenizer,
)
from smoothquant_kernels.checkpoint.size import checkpoint_bytes
from smoothquant_kernels.config import SmoothQuantConfig
from smoothquant_kernels.errors import SmoothQuantError
from smoothquant_kernels.modeling.batches import count_tokens, explained, small_batch
from smoothquant_kernels.modeling.changes import Changes
from smoothquant_kernels.modeling.record import (
    ExpertsRecord,
    LayerRecord,
    ModelRecord,
    Verification,
    skipped_layers,
)
from smoothquant_kernels.modeling.run import Batch, evaluating
from smoothquant_kernels.modeling.view import ModelView
from smoothquant_kernels.nn.experts.source import FloatExperts
from smoothquant_kernels.smoothing.calibrate import (
    CalibrationData,
    Recorder,
    calibration_bar,
    configured_batches,
)
from smoothquant_kernels.smoothing.convert import quantize_model
from smoothquant_kernels.smoothing.experts.observe import watched_names
from smoothquant_kernels.smoothing.patterns import check_patterns, patterns_within
from smoothquant_kernels.smoothing.smooth import relative_difference, smooth_into
from smoothquant_kernels.smoothing.statistics import (
    ActivationStatistics,
    of_heads,
    warn_if_short,
)
from smoothquant_kernels.storage.folder import check_folder, put, seal
from smoothquant_kernels.storage.space import check_space
from smoothquant_kernels.storage.versions import package_version
from smoothquant_kernels.streaming.blocks import BlockChain, BlockView
from smoothquant_kernels.streaming.hidden import hidden_size, joined, known, split
from smoothquant_kernels.streaming.source import (
    IN_MEMORY,
    WeightSource,
    empty_model,
    fill,
    match_names,
    owned_outside,
)
from smoothquant_kernels.streaming.work import (
    WorkFolder,
    digest_of,
    partial_folder,
    remove,
    work_folder,
)
from smoothquant_kernels.streaming.writer import Writer

_SAMPLE = "sample."


def quantize_streamed(
    source: str | Path,
    directory: str | Path,
    data: CalibrationData,
    config: SmoothQuantConfig | None = None,
    *,
    tokenizer: Any = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    overwrite: bool = False,
    resume: bool = True,
    progress: bool = True,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    format: str = NATIVE,
) -> Path:
    """Calibrates, smooths, quantizes and saves a model with one block in memory at a time.

    Memory: about two blocks, the weights outside the blocks (embeddings, head), and the hidden states of all
    calibration tokens (tokens x hidden size). The folder that `load_quantized` reads appears when all is done. Until
    then, the work is in `.<name>.partial` beside it and survives an error or a killed process. The same call then
    resumes after the last finished block.

    Args:
        source: a local folder with config.json and safetensors, of a transformers model whose blocks form a chain
            (decoders and encoders; docs/guides/streaming.md).
        directory: the folder to write.
        data: token-id tensors [T] or [B, T], dicts of tensors, or strings (with `tokenizer`).
        config: `SmoothQuantConfig()` by default.
        tokenizer: turns strings into token ids; its files are written too.
        dtype: the type of the float model; None is that of config.json.
        device: where the current block is computed; None is the CPU.
        overwrite: replace an existing checkpoint, which is lost only after the new one is complete.
        resume: continue the work of an interrupted call. If that call had another source, data or settings, this is
            an error. False drops that work and starts over.
        progress: show a progress bar.
        max_shard_bytes: as in `save_quantized`, but a block is never split.
        format: as in `save_quantized`. ``"compressed-tensors"`` needs a configuration with `folding="only"` (or
            ``"required"``) and `rotation="none"`.

    Returns:
        The folder.

    Raises:
        SmoothQuantError: the source is not such a folder or model, `smooth_lm` or `quantize_model` raises, the folder
            exists, unfinished work there belongs to another call, or the disk refuses.

    Equivalent to:
        model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
        save_quantized(smooth_and_quantize(model, data, config), directory)

    Source: SmoothQuant (Xiao et al., 2022).
    """
    config = config or SmoothQuantConfig()
    check_tokenizer(tokenizer)
    check_shard_bytes(max_shard_bytes)
    check_format(format)
    if format != NATIVE:
        exports.check_config(config)
    target = Path(directory).expanduser().resolve()
    check_folder(target, MARKERS, overwrite=overwrite)
    weights = WeightSource(Path(source).expanduser().resolve())
    model = empty_model(weights.folder, dtype)
    check_patterns(model, config)
    batches = list(configured_batches(model, data, config, tokenizer))
    if not batches:
        ActivationStatistics().check_not_empty()
    warn_if_short(sum(map(count_tokens, batches)), config.calibration_tokens)
    hidden = sum(b["input_ids"].numel() for b in batches if "input_ids" in b) * hidden_size(model)
    # Twice the hidden states, before and after a block, and the largest weight file while files are joined.
    view = ModelView(model, config.float_pattern, config.quantize_head)
    linears, experts = view.linears, view.experts
    if format != NATIVE:
        exports.check_originals(linears)
    whole = checkpoint_bytes(model, linears, config, experts)
    done = partial_folder(target)
    there = sum(f.stat().st_size for f in done.rglob("*") if f.is_file())
    check_space(target, whole + min(whole, max_shard_bytes) + 2 * hidden - there)
    call = {
        "source": [str(weights.folder), weights.identity()],
        "dtype": str(model.dtype),
        "config": config.to_dict(),
        "calibration data": digest_of(batches),
        "max_shard_bytes": max_shard_bytes,
        "format": format,
        "release": [package_version(), torch.__version__],
    }
    try:
        with work_folder(target, call, resume=resume) as work, evaluating(model):
            place = torch.device(device or "cpu")
            writer = Writer(model, work, format, max_shard_bytes)
            stream = _Stream(model, weights, batches, config, work, place, writer)
            stream.run(progress=progress)
            stream.finish(tokenizer)
            seal(work.checkpoint)
            put(work.checkpoint, target, overwrite)
            remove(work.folder)
    except OSError as error:
        raise SmoothQuantError(
            f"{target} cannot be written ({error.strerror or error}): free some space, then repeat the call to go on."
        ) from error
    return target


class _Stream:
    """One call: the chain of blocks, the hidden states that the next one reads, and the records of finished blocks."""

    def __init__(
        self,
        model: Any,
        weights: WeightSource,
        batches: list[Batch],
        config: SmoothQuantConfig,
        work: WorkFolder,
        device: torch.device,
        writer: Writer,
    ) -> None:
        self.model, self.weights, self.batches = model, weights, batches
        self.writer = writer
        self.tokens = sum(map(count_tokens, batches))
        self.config, self.work, self.device = config, work, device
        self.names = match_names(model, weights)
        self.order = [name for name, _ in model.named_modules()]
        # Raises early if there is nothing to quantize. What a layer computes is tested once it has its weights.
        whole = ModelView(model, config.float_pattern, config.quantize_head)
        self.skipped_at_first, self.heads = whole.skipped, whole.heads
        self.chain = BlockChain(model)
        if tied := owned_outside(model, self.chain.empty):
            raise SmoothQuantError(f"{tied[0]} is shared between blocks: {IN_MEMORY}.")
        fill(model, "", self.names, weights)  # the rest, without the blocks
        model.to(device)
        self.sample = batches[0]  # until the first block can be run
        self.records = work.records()
        # What the next block reads: for all batches, and for the sample in the original and in the smoothed model.
        self.hidden: list[Tensor | None] = [None] * len(batches)
        self.original: Tensor | None = None
        self.smoothed: Tensor | None = None

    # --- blocks ---

    def run(self, *, progress: bool) -> None:
        """Runs all blocks that are not finished yet."""
        done = len(self.records)
        if done:
            states = self.work.hidden(done)
            self.hidden = [states[f"batch.{i}"] for i in range(len(self.batches))]
            self.original, self.smoothed = states["original"], states["smoothed"]
            self.chain.tuples = self.records[-1]["tuples"]
            named = {n.partition(_SAMPLE)[2]: t for n, t in states.items() if n.startswith(_SAMPLE)}
            self.sample = named
        else:
            first = self._block(0)
            self.sample = small_batch(
                self.batches[0], lambda b: self.chain.step(0, first, b, None), self.model
            )
            self.chain.prove(first, self.sample)
        with calibration_bar(progress) as bar:
            task = bar.add_task("quantizing (blocks)", total=len(self.chain.names), completed=done)
            for index in range(done, len(self.chain.names)):
                self._do_block(index)
                bar.advance(task)

    def _block(self, index: int) -> nn.Module:
        block = self.chain.copy_of(index)
        fill(block, f"{self.chain.names[index]}.", self.names, self.weights)
        return block.to(self.device)

    def _do_block(self, index: int) -> None:
        block = self._block(index)
        original = self.original

        def output(batch: Mapping[str, Tensor]) -> Tensor:
            return self.chain.output_after(index, block, batch, original)

        view = BlockView(self.chain.names[index], block, output)
        linears, skipped, experts = self._linears(self._view(view))
        self.original, self.smoothed = self._measure(index, block, view, linears, experts)
        skipped |= {layer.name: layer.reason for layer in ModelRecord.of(view).skipped}
        if linears or experts:
            quantize_model(view, config=self._config_of(view))
        record = {
            "layers": [layer.to_dict() for layer in ModelRecord.of(view).layers],
            "experts": [experts.to_dict() for experts in ModelRecord.of(view).experts],
            "skipped": skipped,
            "tuples": self.chain.tuples,
            **self.writer.write(index, view),
        }
        states = {f"batch.{i}": h for i, h in enumerate(self.hidden) if h is not None}
        states |= {"original": self.original, "smoothed": self.smoothed}
        states |= {f"{_SAMPLE}{n}": t for n, t in self.sample.items()}
        self.work.finish_block(index, record, states)
        self.records.append(record)

    def _linears(
        self, view: ModelView
    ) -> tuple[dict[str, nn.Module], dict[str, str], dict[str, FloatExperts]]:
        """Returns the linears of a part to quantize (possibly none), what stays in float and why, and the experts."""
        try:
            return dict(view.linears), dict(view.skipped), dict(view.experts)
        except SmoothQuantError:
            names = {name for name, _ in view.model.named_modules()}
            return {}, {n: r for n, r in self.skipped_at_first.items() if n in names}, {}

    def _measure(
        self,
        index: int,
        block: nn.Module,
        view: nn.Module,
        linears: Mapping[str, nn.Module],
        experts: Mapping[str, FloatExperts],
    ) -> tuple[Tensor, Tensor]:
        """Calibrates and smooths the block. Returns the sample's hidden states after it, original and smoothed."""
        statistics = self._statistics(linears, experts)

        def step(batch: Batch) -> Tensor:
            result: Tensor = explained(
                self.model, batch, lambda: self.chain.step(index, block, *split(batch))
            )
            return result

        recorder = Recorder(statistics, linears, self.model, experts)
        for i, batch in enumerate(self.batches):
            self.hidden[i] = recorder.measure(joined(batch, self.hidden[i]), step).cpu()
        statistics.check_finite()
        original = self.chain.step(index, block, self.sample, self.original).cpu()
        if linears or experts:
            statistics.check_not_empty()
            self._smooth(self._view(view), statistics, step)
        return original, self.chain.step(index, block, self.sample, self.smoothed).cpu()

    def _smooth(
        self, view: ModelView, statistics: ActivationStatistics, run: Callable[[Batch], Tensor]
    ) -> None:
        """Smooths a part of the model. `run` takes a batch joined with the hidden states that the part reads."""
        config, sample = self._config_of(view.model), joined(self.sample, self.original)
        with Changes() as changes:
            smooth_into(view, statistics, config, changes, sample=sample, run_sample=run)

    def _config_of(self, part: nn.Module) -> SmoothQuantConfig:
        """The configuration without patterns for other parts. All patterns were checked on the whole model."""
        return patterns_within(self.config, [n for n, _ in part.named_modules()], self.heads)

    def _view(self, part: nn.Module) -> ModelView:
        return ModelView(part, self.config.float_pattern, self._config_of(part).quantize_head)

    def _statistics(
        self, linears: Mapping[str, nn.Module], experts: Mapping[str, FloatExperts]
    ) -> ActivationStatistics:
        watched = (*linears, *watched_names(experts))
        return ActivationStatistics(
            tokens=self.tokens,
            sample=self.sample,
            watched=watched,
            config=of_heads(self.config, self.heads),
        )

    # --- the rest ---

    def _do_rest(self) -> tuple[list[LayerRecord], dict[str, str], float]:
        """Smooths and quantizes linears outside the blocks. Returns records, skipped layers and the model's change."""
        model = self.model
        before = self.chain.finish(self.sample, known(self.original))
        view = self._view(model)
        # Usually none but the output head, if that is asked for.
        linears, skipped, experts = self._linears(view)
        if linears:
            statistics = self._statistics(linears, experts)

            def around(batch: Batch) -> Tensor:
                batch, hidden = split(batch)
                return self.chain.finish(batch, known(hidden), logits=bool(view.int8_heads))

            recorder = Recorder(statistics, linears, model, experts)
            for batch, hidden in zip(self.batches, self.hidden, strict=True):
                recorder.measure(joined(batch, hidden), around)
            statistics.check_finite()

            # Without its blocks, the model is a small one made of the parts before and after them.
            # `around` still gives its layers the inputs that they have in the whole model.
            self._smooth(view, statistics, around)
        change = relative_difference(self.chain.finish(self.sample, known(self.smoothed)), before)
        if linears:
            quantize_model(model, config=self._config_of(model))
        record = ModelRecord.of(model)
        skipped |= {layer.name: layer.reason for layer in record.skipped}
        return list(record.layers), skipped, change

    def finish(self, tokenizer: Any) -> None:
        """Does the rest of the model, and writes the folder."""
        layers, skipped, change = self._do_rest()
        experts: list[ExpertsRecord] = []
        for record in self.records:
            layers += map(LayerRecord.from_dict, record["layers"])
            experts += map(ExpertsRecord.from_dict, record["experts"])
            skipped = skipped | record["skipped"]
        place = {name: i for i, name in enumerate(self.order)}
        rest = self.writer.part(self.model)
        ModelRecord(
            config=self.config.to_dict(),
            layers=tuple(sorted(layers, key=lambda layer: place[layer.name])),
            skipped=skipped_layers(dict(sorted(skipped.items(), key=lambda s: place[s[0]]))),
            experts=tuple(experts),
            verification=Verification.of(change),
            calibration_tokens=self.tokens,
        ).attach(self.model)
        self.chain.restore()
        self.writer.finish(self.records, rest, self.chain.names, self.order, tokenizer)
