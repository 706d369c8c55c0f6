"""A report on smoothing a model: its activations before and after, what int8 costs each layer, and what would help."""

from __future__ import annotations

import copy
import statistics as stats
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from smoothquant_kernels.config import SmoothQuantConfig
from smoothquant_kernels.errors import SmoothQuantError
from smoothquant_kernels.evaluation.perplexity import Reference, evaluate
from smoothquant_kernels.kv_cache.size import cache_costs
from smoothquant_kernels.modeling.record import HOWS, ModelRecord
from smoothquant_kernels.modeling.run import Batch
from smoothquant_kernels.nn.float_linear import weight_of
from smoothquant_kernels.report import figures as _report_plots
from smoothquant_kernels.report import page as _report_page
from smoothquant_kernels.report.advice import advise
from smoothquant_kernels.report.maxima import has_matplotlib, peak_to_median, spread_maxima
from smoothquant_kernels.report.measure import (
    Measured,
    Plan,
    SettingsOf,
    layer_factors,
    layer_norms,
    measure,
    settings_by_layer,
    stand_in,
)
from smoothquant_kernels.smoothing.calibrate import (
    CalibrationData,
    calibrate_model,
    configured_batches,
    fitting_window,
)
from smoothquant_kernels.smoothing.convert import quantize_model
from smoothquant_kernels.smoothing.smooth import smooth_lm
from smoothquant_kernels.smoothing.statistics import ActivationStatistics
from smoothquant_kernels.storage.document import Document, json_text, note
from smoothquant_kernels.storage.folder import check_folder, new_folder, occupant

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PAGE, NUMBERS, ADVISED = "report.html", "report.json", "advised.json"
_WORST = 10
_FIGURES = 5  # layers whose activations are drawn


def make_report(
    model: nn.Module,
    data: CalibrationData | ActivationStatistics,
    directory: str | Path,
    config: SmoothQuantConfig | None = None,
    *,
    held: CalibrationData,
    tokenizer: Any = None,
    tokens: int = 2048,
    text: Sequence[str] | None = None,
    name: str | None = None,
    sources: tuple[str, str] = ("", ""),
    overwrite: bool = False,
    progress: bool = False,
) -> Document:
    """Measures what smoothing and int8 do to each layer of a float model, and writes a page about it.

    Args:
        model: a float model. It is left unchanged.
        data: the calibration data, or what `calibrate_model` measured on this model.
        directory: the folder to write. It appears only when everything is done.
        config: how the model is smoothed and quantized.
        held: the data to measure the layers on, given like `data`; preferably not the calibration data.
        tokenizer: turns strings into token ids.
        tokens: how many tokens of `held`, and of `text`, are used.
        text: evaluate perplexity and KL divergence on these texts as well (needs `tokenizer`).
        name: the model's name on the page; by default, its class.
        sources: names of the calibration data and of the held data, for the page.
        overwrite: replace an earlier report.
        progress: show progress bars.

    Returns:
        The numbers, as in ``report.json``. Per layer, `sqnr` is 10 log10(|y|^2 / |y_hat - y|^2) in dB over all held
        tokens. y comes from the layer of the smoothed float model, and y_hat from its `W8A8Linear` (exact int8
        numerics) on the same input, so the noise of earlier layers is excluded. `sqnr_naive` is the same without
        smoothing.

    Files:
        ``report.html`` (one file: no script, no network), the figures (.png), ``report.json``, and, if there is advice,
        ``advised.json``: `config` with all of the advice, for ``quantize --config``.

    Memory:
        The model and a smoothed copy. In addition, for one layer at a time, its int8 form and its input and output of
        one batch; the maxima per channel; 128 tokens of the inputs of five layers. `text` adds a quantized copy and up
        to 2 GiB of log-probabilities.

    Raises:
        SmoothQuantError: as in `smooth_lm`; matplotlib is not installed; the folder exists or cannot be written.

    Equivalent to:
        y, y_hat = linear(x), W8A8Linear.from_linear(linear, ...)(x)
        sqnr = 10 * (y.square().sum() / (y_hat - y).square().sum()).log10()

    Source: SmoothQuant (Xiao et al., 2022), figures 1 and 4, sections 3 and 4.
    """
    config = config or SmoothQuantConfig()
    directory = Path(directory)
    check_report_folder(directory, overwrite=overwrite)
    if text is not None and tokenizer is None:
        raise SmoothQuantError("to evaluate on text, make_report needs the tokenizer as well.")
    if tokens < 1:
        raise SmoothQuantError(f"tokens must be at least 1, got {tokens}.")
    batches = list(configured_batches(model, held, config, tokenizer, tokens))
    if not batches:
        raise SmoothQuantError("the held data is empty: give at least one batch with tokens.")
    statistics = data
    if not isinstance(statistics, ActivationStatistics):
        note("calibrating")
        statistics = calibrate_model(
            model, statistics, config, tokenizer=tokenizer, progress=progress
        )
    note("smoothing a copy")
    smoothed = smooth_lm(copy.deepcopy(model), statistics, config=config)
    record = ModelRecord.of(smoothed)
    check = record.verification
    settings_of, logits = settings_by_layer(model, config), config.quantize_head
    layers = _layers(model, record, statistics, settings_of)
    chosen = _figure_layers(layers)
    note(f"measuring {len(layers)} layers, not smoothed and smoothed")
    naive = {
        la["name"]: Plan(None, la["naive_scheme"], float(statistics.absmax[la["name"]].max()))
        for la in layers
        if la["name"] in statistics.absmax
    }
    planned = {
        la["name"]: Plan(la["alpha"], la["activation_scheme"], la["x_absmax"], la["rotation"])
        for la in layers
        if la["x_absmax"] is not None
    }
    before = _measure(model, naive, batches, settings_of, chosen, logits=logits)
    after = _measure(smoothed, planned, batches, settings_of, chosen, logits=logits)
    for layer in layers:
        layer["sqnr_naive"], layer["sqnr"] = before.sqnr(layer["name"]), after.sqnr(layer["name"])
    worst = sorted(
        (la for la in layers if la["sqnr"] is not None), key=lambda la: (la["sqnr"], la["name"])
    )[:_WORST]
    note(f"trying other settings for the worst {len(worst)} layers")
    named = {layer["name"]: layer for layer in layers}
    names = [la["name"] for la in worst]
    advice = advise(model, smoothed, names, named, statistics, batches, settings_of, logits=logits)
    document: Document = {
        "format_version": 1,
        "model": name or type(model).__name__,
        "config": config.to_dict(),
        "calibration": {"source": sources[0], "tokens": statistics.tokens},
        "held": {"source": sources[1], "tokens": after.tokens},
        "summary": _summary(layers, len(record.skipped)),
        "verification": check.to_dict() if check and config.smooth else None,
        "layers": layers,
        "skipped": [layer.to_dict() for layer in record.skipped],
        "advice": advice,
        "figures": [_channels(model, named[n], statistics, settings_of(n)) for n in chosen],
        "evaluation": None,
        "kv_cache": _cache_costs(model),
    }
    if text is not None:
        document["evaluation"] = _evaluate(
            model, smoothed, statistics, config, text, tokenizer, tokens
        )
    del smoothed
    with new_folder(directory, markers=(NUMBERS,), overwrite=overwrite) as folder:
        pictures = _report_plots.draw(document, before.shown, after.shown, folder)
        (folder / NUMBERS).write_text(json_text(document) + "\n", encoding="utf-8")
        advised = advised_config(config, advice)
        if advised != config:
            (folder / ADVISED).write_text(advised.to_json() + "\n", encoding="utf-8")
        page = _report_page.page(
            document, pictures, folder, advised=ADVISED if advised != config else None
        )
        (folder / PAGE).write_text(page, encoding="utf-8")
    return document


def check_report_folder(directory: Path, *, overwrite: bool) -> None:
    """Raises SmoothQuantError, before long work starts, if the report could not be drawn or written."""
    if not has_matplotlib():
        raise SmoothQuantError(
            "a report needs matplotlib for its figures: run `pip install matplotlib`."
        )
    if occupant(directory, (NUMBERS,)) == "other":
        raise SmoothQuantError(
            f"{directory} exists already, is not a report and is not replaced; give another name."
        )
    check_folder(directory, (NUMBERS,), overwrite=overwrite)


def advised_config(config: SmoothQuantConfig, advice: Iterable[Document]) -> SmoothQuantConfig:
    """The configuration with all settings of the advice. It equals `config` if there are none."""
    alphas, schemes = dict(config.alphas), dict(config.schemes)
    for entry in advice:
        settings = entry["settings"] or {}
        alphas.update(settings.get("alphas", {}))
        schemes.update(settings.get("schemes", {}))
    return config.replace(alphas=alphas, schemes=schemes)


def unsmoothed(config: SmoothQuantConfig) -> SmoothQuantConfig:
    """The configuration of naive W8A8, to compare with."""
    return config.replace(smooth=False, rotation="none", rotations={}, weight_rounding="nearest")


# --- the layers -------------------------------------------------------------------------------------------------------


def split_name(name: str) -> tuple[int, str]:
    """The number of the block (0 if there is none) and the layer's role in it: ``(3, "mlp.experts.*.w1")``."""
    parts = name.split(".")
    for i, part in enumerate(parts):
        if part.isdigit() and i + 1 < len(parts):
            return int(part), ".".join("*" if p.isdigit() else p for p in parts[i + 1 :])
    return 0, name


def _layers(
    model: nn.Module,
    record: ModelRecord,
    statistics: ActivationStatistics,
    settings_of: SettingsOf,
) -> list[Document]:
    layers = []
    for layer in record.layers:
        name, peak = layer.name, layer.x_peak
        config = settings_of(name)
        naive = unsmoothed(config)
        index, role = split_name(name)
        entry = {
            **layer.to_dict(),
            "index": index,
            "role": role,
            "rotation": layer.rotation,
            "activation_scheme": config.scheme_of(peak, name),
            "naive_scheme": naive.scheme_of(peak, name),
            "float_bytes": weight_of(model.get_submodule(name)).element_size(),
            "channel_peak": None,
            "channel_peak_smoothed": None,
        }
        if name in statistics.absmax:
            absmax = statistics.absmax[name]
            norms = layer.norms or layer_norms(config, layer.group, peak, layer.rotation)
            factors = layer_factors(model, layer.group, statistics, layer.alpha, norms, config)
            entry["channel_peak"] = peak_to_median(absmax)
            entry["channel_peak_smoothed"] = peak_to_median(absmax / factors)
        layers.append(entry)
    return layers


def _measure(
    model: nn.Module,
    plans: Mapping[str, Plan],
    batches: Sequence[Batch],
    settings_of: SettingsOf,
    shown: Sequence[str],
    *,
    logits: bool,
) -> Measured:
    stands = {name: [stand_in(plan, name, settings_of(name))] for name, plan in plans.items()}
    return measure(model, stands, batches, shown=shown, logits=logits)


def _figure_layers(layers: Sequence[Document]) -> list[str]:
    """The layer with the greatest channel outlier for each role that heads a group of readers, the worst first."""
    worst: dict[str, Document] = {}
    for layer in layers:
        if layer["channel_peak"] is None:
            continue
        reader = split_name(layer["group"][0])[1]  # q, k and v read one tensor and share a figure
        known = worst.get(reader)
        if known is None or layer["channel_peak"] > known["channel_peak"]:
            worst[reader] = layer
    return [layer["name"] for layer in sorted(worst.values(), key=lambda la: -la["channel_peak"])][
        :_FIGURES
    ]


def _channels(
    model: nn.Module,
    layer: Document,
    statistics: ActivationStatistics,
    config: SmoothQuantConfig,
) -> Document:
    """The maxima per channel over the calibration tokens, to six digits; rotated ones over the tokens that it kept."""
    absmax = statistics.absmax[layer["name"]]
    norms = layer_norms(config, layer["group"], layer["x_peak"], layer["rotation"])
    norms = layer.get("norms") or norms
    factors = layer_factors(model, layer["group"], statistics, layer["alpha"], norms, config)

    def digits(values: Tensor) -> list[float]:
        return [float(f"{v:.6g}") for v in values.tolist()]

    result: Document = {
        "layer": layer["name"],
        "rotation": layer["rotation"],
        "absmax": digits(absmax),
        "absmax_smoothed": digits(absmax / factors),
    }
    if layer["rotation"]:
        kept = statistics.rows[layer["name"]].both().float() / factors
        result["absmax_rotated"] = digits(spread_maxima(kept, layer["rotation"]))
    return result


# --- the whole --------------------------------------------------------------------------------------------------------


def _summary(layers: Sequence[Document], skipped: int) -> Document:
    def numbers(key: str) -> Document:
        values = [layer[key] for layer in layers if layer[key] is not None]
        return {"median": stats.median(values), "worst": min(values)} if values else {}

    hows = [layer["smoothing"] for layer in layers]
    return {
        "quantized": len(layers),
        **{how: hows.count(how) for how in HOWS},
        "skipped": skipped,
        "sqnr_naive": numbers("sqnr_naive"),
        "sqnr": numbers("sqnr"),
    }


def _cache_costs(model: Any) -> Document | None:
    """Bytes of a cache of keys and values; None if the model has none, or its configuration does not say it."""
    generates = hasattr(model, "can_generate") and model.can_generate()
    return cache_costs(model.config.to_dict()) if generates else None


def _evaluate(
    model: nn.Module,
    smoothed: nn.Module,
    statistics: ActivationStatistics,
    config: SmoothQuantConfig,
    text: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    tokens: int,
) -> Document:
    """The perplexity and KL of the float, naive W8A8 and smoothed int8 models. It quantizes `smoothed` in place."""
    reference = Reference(model)
    window = fitting_window(config.calibration_window, tokenizer, model)

    def score(what: str, candidate: nn.Module) -> Document:
        note(f"evaluating {what}")
        result = evaluate(
            candidate, text, tokenizer, reference=reference, max_tokens=tokens,
            window=window,
        )  # fmt: skip
        return {k: v for k, v in result.to_dict().items() if k != "seconds"}

    done = {"float": score("the float model", model)}
    done["smoothed"] = score("the smoothed int8 model", quantize_model(smoothed, config=config))
    if config.smooth:
        naive = smooth_lm(copy.deepcopy(model), statistics, config=unsmoothed(config))
        done["naive"] = score("the int8 model without smoothing", quantize_model(naive))
    return done
