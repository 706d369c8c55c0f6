"""`smoothquant-kernels quantize`: calibrates, smooths, quantizes and saves."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Group
from rich.table import Table
from rich.text import Text
from torch import nn

from smoothquant_kernels.checkpoint.compressed_tensors.export import check_originals, exportable
from smoothquant_kernels.checkpoint.manifest import read_info
from smoothquant_kernels.checkpoint.save import NATIVE, check_format, save_quantized
from smoothquant_kernels.checkpoint.size import checkpoint_bytes
from smoothquant_kernels.cli.console import quiet_stderr, show_progress
from smoothquant_kernels.cli.inputs import calibration_inputs, describe_inputs, processor_of
from smoothquant_kernels.cli.inspect import (
    describe_config,
    describe_verification,
)
from smoothquant_kernels.cli.loading import (
    changed_settings,
    check_output,
    choose_device,
    choose_dtype,
    config_of,
    holds_int8,
    linear_bytes,
    read_config,
    tensor_bytes,
    weight_files,
)
from smoothquant_kernels.cli.options import KV_CACHES
from smoothquant_kernels.cli.tables.layers import render_layers, summarize_layers
from smoothquant_kernels.config import SmoothQuantConfig
from smoothquant_kernels.errors import SmoothQuantError
from smoothquant_kernels.evaluation.architecture import check_causal
from smoothquant_kernels.evaluation.models import load_model
from smoothquant_kernels.kv_cache.recording import KVRecorder
from smoothquant_kernels.modeling.batches import count_tokens
from smoothquant_kernels.modeling.record import ModelRecord
from smoothquant_kernels.modeling.view import ModelView
from smoothquant_kernels.plan import apply_plan, read_plan
from smoothquant_kernels.smoothing.calibrate import calibrate_model, configured_batches
from smoothquant_kernels.smoothing.convert import quantize_model
from smoothquant_kernels.smoothing.kv_cache import calibrate_kv_cache
from smoothquant_kernels.smoothing.smooth import check_finite_weights, smooth_lm
from smoothquant_kernels.smoothing.statistics import ActivationStatistics
from smoothquant_kernels.storage.document import Document, json_text, note, readable_size
from smoothquant_kernels.storage.folder import replace_file
from smoothquant_kernels.storage.safetensors import stored_sizes
from smoothquant_kernels.storage.space import check_space

if TYPE_CHECKING:
    from smoothquant_kernels.search.costs import LayerCost

_COST_TOKENS = 512  # to estimate the costs of layers on


def work(
    source: str,
    output: Path,
    *,
    config_file: Path | None,
    plan_file: Path | None,
    max_bytes: int | None,
    max_kl: float | None,
    calibration: str,
    dtype: str,
    device: str,
    force: bool,
    search: bool,
    stream: bool,
    restart: bool,
    format: str,
    strict: bool,
    kv_cache: str | None,
    **options: Any,
) -> Document:
    """Writes the checkpoint; `options` are the options that change settings."""
    begin = time.perf_counter()
    check_format(format)
    _check_kv_cache(kv_cache, source, stream=stream)
    config = read_config(config_file, changed_settings(**options))
    if plan_file is not None:
        config = apply_plan(config, read_plan(plan_file))
    budget = {"max_bytes": max_bytes, "max_kl": max_kl}
    planned = any(value is not None for value in budget.values())
    if planned:
        _check_budget(budget, plan_file, search=search, stream=stream, smooth=config.smooth)
    if format != NATIVE:
        config = exportable(config, strict=strict)
    elif strict:
        raise SmoothQuantError(
            "--strict refuses what a format cannot express, and the native format expresses everything: give it with "
            "--format compressed-tensors."
        )
    check_output(output, force=force)
    searchable = config.smooth or config.activation_scheme == "static"
    columns = "static" in (config.outliers, *config.outlier_layers.values())
    measured = searchable or columns or config.rounds_by_gptq
    if search and stream:
        raise SmoothQuantError(
            "--search needs the whole model in memory: search first, then stream with the settings it found (--config)."
        )
    if search and not searchable:
        raise SmoothQuantError(
            "there is nothing to search without smoothing: leave out --no-smooth."
        )
    if restart and not stream:
        raise SmoothQuantError("--restart drops the unfinished work of --stream; give both.")
    float_type, where = choose_dtype(dtype), choose_device(device)
    if holds_int8(source):
        raise SmoothQuantError(f"{source} is quantized already; give the original model.")
    if stream:
        document = _quantize_streamed(
            source, output, config, calibration=calibration, dtype=float_type, device=where,
            force=force, resume=not restart, format=format,
        )  # fmt: skip
        return {**document, "seconds": time.perf_counter() - begin}
    inputs = calibration_inputs(source, calibration, config) if measured else None
    cache_inputs = inputs or (calibration_inputs(source, calibration, config) if kv_cache else None)
    processor = processor_of(source) if cache_inputs is None else cache_inputs.processor
    note(f"loading {source}")
    with quiet_stderr():
        plain: Any = load_model(source, dtype=float_type)
    model: nn.Module = plain.to(where)
    if kv_cache is not None:
        KVRecorder(model)  # raises early
    view = ModelView(model, config.float_pattern, config.quantize_head)
    linears, skipped = view.linears, view.skipped
    if format != NATIVE:
        check_originals(linears)
    check_finite_weights(linears)  # before the calibration, which can take a long time
    before = {"model": tensor_bytes(model), "linears": linear_bytes(model, list(skipped))}
    check_space(output, checkpoint_bytes(model, linears, config, view.experts))
    costs: dict[str, LayerCost] = {}
    if inputs is not None:
        if search:
            config = _search(model, inputs.batches, config, output)
        elif planned:
            config = _plan(model, inputs.batches, config, output, budget)
        note(f"calibrating on {inputs}")
        statistics = calibrate_model(model, inputs.batches, config, progress=show_progress())
        smooth_lm(model, statistics, config=config)
        if format != NATIVE:
            costs = _costs(model, statistics, inputs.batches, config)
        del statistics  # what GPTQ needs is large, and the linears have it
    quantize_model(model, config=config)
    cache = None
    if cache_inputs is not None and kv_cache is not None:  # the values of the quantized model
        note("calibrating the cache")
        cache = calibrate_kv_cache(model, cache_inputs.batches, progress=show_progress())
    after = {"model": tensor_bytes(model), "linears": linear_bytes(model, list(skipped))}
    note(f"saving {output}")
    save_quantized(model, output, tokenizer=processor, overwrite=force, format=format)
    record = ModelRecord.of(model)
    return {
        "model": source,
        "output": str(output),
        "format": format,
        "config": record.config,
        "calibration": None if inputs is None else inputs.facts,
        "kv_cache": cache and {"layers": len(cache.layers), "tokens": cache.tokens},
        **summarize_layers(record.layers, record.skipped, costs, record.experts),
        "verification": record.verification and record.verification.to_dict(),
        "bytes": {
            "model_before": before["model"],
            "model_after": after["model"],
            "linears_before": before["linears"],
            "linears_after": after["linears"],
            "weight_files": sum(file.stat().st_size for file in weight_files(output)),
        },
        "seconds": time.perf_counter() - begin,
    }


def _check_budget(
    budget: dict[str, Any], plan_file: Path | None, *, search: bool, stream: bool, smooth: bool
) -> None:
    """Raises SmoothQuantError, before anything is read, unless a plan can be searched."""
    given = [f"--{name.replace('_', '-')}" for name, value in budget.items() if value is not None]
    others = {"--plan": plan_file is not None, "--search": search, "--stream": stream}
    clash = [*given[1:], *(name for name, is_given in others.items() if is_given)]
    if clash:
        raise SmoothQuantError(
            f"{given[0]} searches a plan, which excludes {clash[0]}: search first, then give "
            "the plan that it found (--plan)."
        )
    if not smooth:
        raise SmoothQuantError(f"{given[0]} measures smoothed layers: leave out --no-smooth.")


def _plan(
    model: nn.Module,
    windows: list[Any],
    config: SmoothQuantConfig,
    output: Path,
    budget: dict[str, Any],
) -> SmoothQuantConfig:
    """The settings with the plan that a search finds, which a file next to the future checkpoint keeps."""
    from smoothquant_kernels.search.plan_search import describe, search_plan

    note("searching the format of each layer")
    found = search_plan(model, windows, config, **budget, progress=show_progress())
    path = output.absolute().with_name(f"{output.name}.plan.json")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replace_file(path) as part:
            part.write_text(json_text(found.plan) + "\n", "utf-8")
    except OSError as error:
        raise SmoothQuantError(f"{path} cannot be written: {error.strerror}.") from error
    for sentence in describe(found):
        note(sentence)
    note(
        f"{readable_size(found.nbytes)} in these layers, an estimated KL divergence of {found.kl:.4f}; the plan is "
        f"kept in {path}"
    )
    return found.config


def _check_kv_cache(name: str | None, source: str, *, stream: bool) -> None:
    """Raises SmoothQuantError, before anything is read, unless this cache can be calibrated."""
    if name is None:
        return
    if name == KV_CACHES[0]:
        raise SmoothQuantError(
            "--kv-cache int8 needs no calibration, so a checkpoint stores nothing for it: leave it out here, and give "
            "it to generate and evaluate."
        )
    if name not in KV_CACHES:
        raise SmoothQuantError(f"--kv-cache must be {KV_CACHES[1]} here; got {name!r}.")
    if stream:
        raise SmoothQuantError(
            "--kv-cache int8-static calibrates the quantized model as a whole, which --stream never has in memory: "
            "leave out one of them; in Python, calibrate_kv_cache takes the loaded checkpoint."
        )
    if not holds_int8(source):
        check_causal(config_of(source), source, "--kv-cache")


def _quantize_streamed(
    source: str,
    output: Path,
    config: SmoothQuantConfig,
    *,
    calibration: str,
    dtype: torch.dtype,
    device: torch.device,
    force: bool,
    resume: bool,
    format: str,
) -> Document:
    """Quantizes a model that is never in memory as a whole; the document describes the written checkpoint."""
    from smoothquant_kernels.streaming.source import check_folder
    from smoothquant_kernels.streaming.stream import quantize_streamed

    check_folder(Path(source))
    inputs = calibration_inputs(source, calibration, config)
    note(f"quantizing {source} block by block on {inputs}")
    quantize_streamed(
        source, output, inputs.batches, config, tokenizer=inputs.processor, dtype=dtype, device=device,
        overwrite=force, resume=resume, progress=show_progress(), format=format,
    )  # fmt: skip
    record = ModelRecord.from_dict(read_info(output))
    sizes = stored_sizes(weight_files(output))
    # The whole float model is never loaded, so this counts the weights of its linears, without any bias.
    linears = sum(layer.out_features * layer.in_features for layer in record.layers)
    linears += sum(experts.weights for experts in record.experts)
    names = [layer.name for layer in record.layers] + [e.name for e in record.experts]
    inside = tuple(f"{name}." for name in names)
    return {
        "model": source,
        "output": str(output),
        "format": format,
        "config": record.config,
        "calibration": inputs.facts,
        "kv_cache": None,
        **summarize_layers(record.layers, record.skipped, experts=record.experts),
        "verification": record.verification and record.verification.to_dict(),
        "bytes": {
            "model_before": None,
            "model_after": sum(sizes.values()),
            "linears_before": linears * dtype.itemsize,
            "linears_after": sum(size for name, size in sizes.items() if name.startswith(inside)),
            "weight_files": sum(file.stat().st_size for file in weight_files(output)),
        },
    }


def _costs(
    model: nn.Module,
    statistics: ActivationStatistics,
    batches: list[Any],
    config: SmoothQuantConfig,
) -> dict[str, LayerCost]:
    """What each layer costs in KL divergence, estimated on the last batches, about `_COST_TOKENS` tokens."""
    from smoothquant_kernels.search.costs import layer_costs

    note("estimating what each layer costs")
    given = list(configured_batches(model, batches, config, None))
    some: list[Any] = []
    while given and sum(map(count_tokens, some)) < _COST_TOKENS:
        some.append(given.pop())
    return layer_costs(model, statistics, some, config)


def _search(
    model: nn.Module, windows: list[Any], config: SmoothQuantConfig, output: Path
) -> SmoothQuantConfig:
    """The settings that a search finds. A file next to the future checkpoint keeps what it has tried so far."""
    from smoothquant_kernels.search.search import search_config

    path = output.absolute().with_name(f"{output.name}.search.json")
    note(f"searching settings for each layer; what is found is kept in {path}")
    path.parent.mkdir(parents=True, exist_ok=True)
    found = search_config(model, windows, config, path=path, progress=show_progress())
    note(
        "the settings found for each layer are kept"
        if found.kept == "searched"
        else "on further tokens they were no better than the best fixed alpha, which is kept"
    )
    return found.config


def render(document: Document) -> Group:
    size = document["bytes"]
    facts = Table.grid(padding=(0, 2))
    facts.add_row("settings", describe_config(document))
    if (calibration := document["calibration"]) is not None:
        facts.add_row("calibrated on", describe_inputs(calibration))
    if (cache := document["kv_cache"]) is not None:
        facts.add_row("cache", f"{cache['layers']} layers calibrated on {cache['tokens']} tokens")
    facts.add_row("verified", describe_verification(document))
    # a streamed model was never in memory as a whole
    whole = f"{readable_size(size['model_before'])} -> " if size["model_before"] else ""
    facts.add_row(
        "size",
        f"model {whole}{readable_size(size['model_after'])}, "
        f"its quantized linears {readable_size(size['linears_before'])} -> "
        f"{readable_size(size['linears_after'])}",
    )
    facts.add_row("seconds", f"{document['seconds']:.1f}")
    saved = Text(f"saved {document['output']}", style="bold")
    return Group(render_layers(document), facts, saved)
