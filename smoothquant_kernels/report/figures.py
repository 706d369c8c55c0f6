"""The pictures of a report. The colors are viridis, and blue and orange-red, which also differ in lightness."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from smoothquant_kernels.report.maxima import (
    AFTER,
    BEFORE,
    ROTATED,
    peak_to_median,
    short_number,
    spread,
)
from smoothquant_kernels.storage.document import Document

_DPI = 110
_COLUMNS = 512  # of a heat map; more would be narrower than a pixel
# Both the color and the marker distinguish the schemes.
_SCHEMES = {
    "per_token": ("#2a6f97", "s"),
    "per_tensor": ("#7a5195", "^"),
    "static": ("#c8553d", "o"),
}


@dataclass(frozen=True)
class Picture:
    """A file in the report's folder, with a description for readers who cannot see it."""

    file: str
    alt: str
    width: int
    height: int


def draw(
    document: Document, before: Mapping[str, Tensor], after: Mapping[str, Tensor], folder: Path
) -> dict[str, Picture]:
    """Draws all figures into the folder.

    Args:
        before, after: layer -> x [T, K] of the first held tokens, not smoothed and smoothed, for the layers of
            `document["figures"]`.

    Returns:
        The pictures ``"sqnr"`` and ``"alpha"`` (if any layer has such a value), and one by each drawn layer's name.
    """
    pictures = {}
    for number, figure in enumerate(document["figures"], 1):
        name = figure["layer"]
        if name in before and name in after:
            pictures[name] = _activations(
                figure, before[name], after[name], folder / f"activations_{number}.png"
            )
    layers = document["layers"]
    if any(layer["sqnr"] is not None for layer in layers):
        pictures["sqnr"] = _sqnr(layers, folder / "sqnr.png")
    if any(layer["alpha"] is not None for layer in layers):
        pictures["alpha"] = _alpha(layers, folder / "alpha.png")
    return pictures


def _figure(width: float, height: float) -> Any:
    # The object interface, not pyplot: no global state and no display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # The callers set the margins, because a layout engine draws everything twice.
    figure = Figure(figsize=(width, height), dpi=_DPI)
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Any, path: Path, alt: str) -> Picture:
    figure.savefig(path, bbox_inches="tight", pad_inches=0.05)  # keeps labels beside the axes
    width, height = (round(inches * _DPI) for inches in figure.get_size_inches())
    return Picture(path.name, alt, width, height)


# --- activations ------------------------------------------------------------------------------------------------------


def _activations(figure: Document, before: Tensor, after: Tensor, path: Path) -> Picture:
    """Top: the largest |x| of each channel. Bottom: |x| of each token. From left to right, the axes are the same."""
    from matplotlib.colors import LogNorm
    from matplotlib.ticker import NullLocator

    maxima = [torch.tensor(figure["absmax"]), torch.tensor(figure["absmax_smoothed"])]
    tokens, titles = [before, after], ["before smoothing", "after smoothing"]
    if rotation := figure["rotation"]:
        maxima.append(torch.tensor(figure["absmax_rotated"]))
        tokens.append(spread(after, rotation))
        titles.append(f"and rotation by {rotation}")
    both = torch.cat(maxima)
    both = both[both > 0]
    drawing = _figure(11, 4.7)
    axes = drawing.subplots(
        2,
        len(maxima),
        sharex=True,
        sharey="row",
        squeeze=False,
        gridspec_kw={"height_ratios": [1, 1.15]},
    )
    pooled = [_pool(x.abs()) for x in tokens]
    drawing.subplots_adjust(0.064, 0.105, 0.926, 0.94, wspace=0.035, hspace=0.1)
    low, high = _color_range(torch.cat(pooled))
    norm = LogNorm(low, high)
    image = None
    for column, (values, x, color, what) in enumerate(
        zip(maxima, pooled, (BEFORE, AFTER, ROTATED), titles, strict=False)
    ):
        line, heat = axes[0][column], axes[1][column]
        channels = len(values)
        line.set_yscale("log")
        line.yaxis.set_minor_locator(NullLocator())  # they would take most of the drawing time
        floor = float(both.quantile(0.002)) / 2 if len(both) else 0.1
        line.fill_between(
            range(channels), floor, values.clamp_min(floor).numpy(), step="mid", color=color, lw=0
        )
        median = float(values[values > 0].median()) if bool((values > 0).any()) else 1.0
        tall = values > 3 * median
        # A single channel among thousands is thinner than a pixel, but the outliers are the point of the figure.
        line.vlines(tall.nonzero()[:, 0].numpy(), floor, values[tall].numpy(), color=color, lw=1.2)
        line.axhline(median, color="black", lw=0.9, ls=(0, (4, 3)))
        if len(both):
            line.set_ylim(floor, float(both.max()) * 8)
        line.set_title(what, fontsize=12, loc="left", fontweight="bold")
        line.text(
            0.985, 0.94, f"largest {short_number(float(values.max()))} = "
            f"{short_number(peak_to_median(values))} x median (dashed)",
            transform=line.transAxes, ha="right", va="top", fontsize=10,
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 1.5},
        )  # fmt: skip
        line.spines[["top", "right"]].set_visible(False)
        image = heat.imshow(
            x.clamp_min(low).numpy(), norm=norm, cmap="viridis", aspect="auto",
            interpolation="nearest", origin="upper", extent=(0, channels, len(x), 0),
        )  # fmt: skip
        heat.set_xlabel("input channel")
    axes[0][0].set_ylabel("max |x| of channel")
    axes[1][0].set_ylabel("token")
    drawing.align_ylabels(axes[:, 0])
    place = axes[1][-1].get_position()
    scale = drawing.add_axes((place.x1 + 0.012, place.y0, 0.011, place.height))
    drawing.colorbar(image, cax=scale, label="|x|", extend="max")
    peaks = [short_number(peak_to_median(values)) for values in maxima]
    alt = (
        f"Input of {figure['layer']} before and after smoothing: the largest channel is {peaks[0]} times the median "
        f"channel before and {peaks[1]} times after"
    )
    alt += f", and {peaks[2]} times after rotation as well." if len(peaks) > 2 else "."
    return _save(drawing, path, alt)


def _pool(x: Tensor) -> Tensor:
    """Reduces [T, K] to at most `_COLUMNS` columns by the maximum of neighbors, so no outlier is lost."""
    size = math.ceil(x.shape[1] / _COLUMNS)
    padded = F.pad(x, (0, -x.shape[1] % size))
    return padded.reshape(len(x), -1, size).amax(-1)


def _color_range(x: Tensor) -> tuple[float, float]:
    """The range that the colors span. A few massive elements must not leave all others dark."""
    values = x[x > 0].flatten()
    if not len(values):
        return 0.1, 1.0
    values = values[:: max(1, len(values) // 1_000_000)]  # `quantile` has a size limit
    low, high = (float(q) for q in values.quantile(torch.tensor([0.05, 0.9995])))
    return low, max(high, 2 * low)


# --- layers -----------------------------------------------------------------------------------------------------------


def _roles(layers: Sequence[Document]) -> list[str]:
    return list(dict.fromkeys(layer["role"] for layer in layers))


def _panels(count: int, height: float) -> tuple[Any, list[Any], int]:
    """A figure of `count` panels with the same axes, its panels, and the number of columns."""
    columns = min(4, max(1, count))
    rows = max(1, math.ceil(count / columns))
    whole = height * rows + 0.8
    drawing = _figure(11, whole)
    grid = drawing.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    drawing.subplots_adjust(
        0.052, 0.48 / whole, 0.995, 1 - 0.68 / whole, wspace=0.08, hspace=0.55 * rows / whole
    )
    flat = [axes for line in grid for axes in line]
    for axes in flat[count:]:
        axes.set_visible(False)
    return drawing, flat, columns


def _label(axes: Any, title: str) -> None:
    axes.set_title(title, fontsize=10, family="monospace", loc="left")
    axes.grid(alpha=0.3, lw=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def _label_axes(panels: Sequence[Any], columns: int, what: str) -> None:
    for i, axes in enumerate(panels):
        if i % columns == 0:
            axes.set_ylabel(what)
        if i + columns >= len(panels):
            axes.set_xlabel("block")
            axes.tick_params(labelbottom=True)
            axes.xaxis.get_major_locator().set_params(integer=True)


def _sqnr(layers: Sequence[Document], path: Path) -> Picture:
    """One panel for each role: dB by block, without and with smoothing."""
    roles = [
        r for r in _roles(layers) if any(_finite(la["sqnr"]) for la in layers if la["role"] == r)
    ]
    drawing, flat, columns = _panels(len(roles), 2.35)
    for axes, role in zip(flat, roles, strict=False):
        chosen = [layer for layer in layers if layer["role"] == role]
        for key, color, marker, label in (
            ("sqnr_naive", BEFORE, "o", "without smoothing"),
            ("sqnr", AFTER, "s", "smoothed"),
        ):
            points = [(la["index"], la[key]) for la in chosen if _finite(la[key])]
            axes.plot(
                [p[0] for p in points], [p[1] for p in points], color=color, marker=marker, ms=4,
                lw=1.2, label=label, ls=(0, (3, 2)) if key == "sqnr_naive" else "-",
            )  # fmt: skip
        _label(axes, role)
    _label_axes(flat[: len(roles)], columns, "SQNR (dB)")
    if roles:
        handles, labels = flat[0].get_legend_handles_labels()
        drawing.legend(handles, labels, loc="upper center", ncols=2, frameon=False)
    return _save(
        drawing, path,
        f"Signal to quantization noise by block for {len(roles)} kinds of layers, without smoothing and smoothed; the "
        "numbers are in the table of all layers.",
    )  # fmt: skip


def _alpha(layers: Sequence[Document], path: Path) -> Picture:
    """One panel for each kind of group: migration strength by block, with the scheme and whether s was folded."""
    from matplotlib.lines import Line2D

    groups = {tuple(la["group"]): la for la in layers if la["alpha"] is not None}
    labels = {key: _group_label(key) for key in groups}
    names = list(dict.fromkeys(labels.values()))
    drawing, flat, columns = _panels(len(names), 2.0)
    for axes, name in zip(flat, names, strict=False):
        for key, layer in groups.items():
            if labels[key] == name:
                color, marker = _SCHEMES[layer["activation_scheme"]]
                filled = layer["smoothing"] == "folded"
                axes.plot(
                    [layer["index"]], [layer["alpha"]], color=color, marker=marker, ms=5, ls="",
                    mfc=color if filled else "none",
                )  # fmt: skip
        axes.set_ylim(-0.05, 1.05)
        _label(axes, name)
    _label_axes(flat[: len(names)], columns, "alpha")
    handles = [
        Line2D([], [], ls="", marker=marker, color=color, label=f"scales {scheme}")
        for scheme, (color, marker) in _SCHEMES.items()
        if any(layer["activation_scheme"] == scheme for layer in groups.values())
    ]
    handles += [
        Line2D([], [], ls="", marker="o", color="black", mfc=face, label=text)
        for face, text in (("black", "filled: folded"), ("none", "open: divided at run time"))
    ]
    drawing.legend(handles=handles, loc="upper center", ncols=len(handles), frameon=False)
    alphas = [layer["alpha"] for layer in groups.values()]
    return _save(
        drawing, path,
        f"Migration strength alpha of {len(groups)} groups of layers by block, between {min(alphas):g} and "
        f"{max(alphas):g}; the numbers are in the table of groups.",
    )  # fmt: skip


def _group_label(members: Sequence[str]) -> str:
    """The last names of layers that read one tensor, at most three, as in ``"q_proj, k_proj, v_proj"``."""
    short = list(dict.fromkeys(name.rsplit(".", 1)[-1] for name in members))
    return ", ".join(short[:3]) + (", ..." if len(short) > 3 else "")


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)
