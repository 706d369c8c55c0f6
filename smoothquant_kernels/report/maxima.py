"""Figures of activation maxima. matplotlib is optional: `pip install smoothquant-kernels[demo]`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from smoothquant_kernels.errors import SmoothQuantError
from smoothquant_kernels.ops.rotate import rotated

BEFORE, AFTER, ROTATED = "#c8553d", "#2a6f97", "#3f3351"  # far apart in hue and in lightness
_FLOOR = 1e-12  # where the bars begin, because a logarithmic axis has no zero
_OUTLIER = 3.0


@dataclass(frozen=True, eq=False)
class LayerMaxima:
    """The largest |activation| per input channel of one layer, [K] each: before and after smoothing, and rotated.

    `note` says in a few words what was done. A layer that is not rotated has no third maxima.
    """

    name: str
    before: Tensor
    after: Tensor
    note: str = ""
    rotated: Tensor | None = None


def spread(x: Tensor, rotation: int) -> Tensor:
    """x [..., K] rotated in groups, and divided by their gain, sqrt(rotation), so that magnitudes can be compared."""
    return rotated(x, rotation) / math.sqrt(rotation)


def spread_maxima(x: Tensor, rotation: int) -> Tensor:
    """The largest |value| [K] of each channel of smoothed tokens x [M, K], after `spread`."""
    return spread(x, rotation).abs().amax(0)


def peak_to_median(absmax: Tensor) -> float:
    """The ratio of the largest channel to the median one, without dead channels."""
    alive = absmax[absmax > 0]
    return float(alive.max() / alive.median()) if len(alive) else 1.0


def has_matplotlib() -> bool:
    """Whether figures can be drawn."""
    return find_spec("matplotlib") is not None


def plot_maxima(layers: Sequence[LayerMaxima], path: Path, *, title: str) -> None:
    """Draws the activation maxima of some layers per channel: before smoothing, after it, and rotated.

    Args:
        layers: the layers, one row of the figure each.
        path: the file to write. Its suffix selects the format (.png, .svg, .pdf).
        title: the heading.

    Raises:
        SmoothQuantError: matplotlib is not installed, or there is no layer.
    """
    if not has_matplotlib():
        raise SmoothQuantError("figures need matplotlib: run `pip install matplotlib`.")
    if not layers:
        raise SmoothQuantError("there is no layer to draw.")
    # The object interface, not pyplot: no global state and no display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    height = 2.1 * len(layers) + 1.3
    figure = Figure(figsize=(11, height), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=13, fontweight="bold")
    columns = 2 if all(layer.rotated is None for layer in layers) else 3
    grid = figure.subplots(len(layers), columns, sharey="row", squeeze=False)
    for row, layer in zip(grid, layers, strict=True):
        _draw(row[0], layer.before, BEFORE)
        _draw(row[1], layer.after, AFTER)
        if layer.rotated is not None:
            _draw(row[2], layer.rotated, ROTATED)
        row[0].set_ylabel("max |x|")
        row[0].set_title(layer.name, loc="left", fontsize=10, fontweight="bold", family="monospace")
        row[1].set_title(layer.note, loc="left", fontsize=10)
        values = torch.cat([layer.before, layer.after])
        values = values[values > 0]
        if len(values):
            # Dead channels must not stretch the axis. The numbers need room at the top.
            low = float(values.quantile(0.002)) / 2
            row[0].set_ylim(low, float(values.max()) * 6)
    titles = ("before smoothing", "after smoothing", "and rotation")
    for axes, what in zip(grid[0], titles, strict=False):
        axes.annotate(
            what, (0.5, 1.2), xycoords="axes fraction", ha="center", fontsize=12,
        )  # fmt: skip
    for axes in grid[-1]:
        axes.set_xlabel("input channel")
    figure.align_ylabels(grid[:, 0])
    figure.savefig(path)


def _draw(axes: Any, absmax: Tensor, color: str) -> None:
    values = absmax.cpu().float()
    alive = values[values > 0]
    median = float(alive.median()) if len(alive) else _FLOOR
    axes.set_yscale("log")
    channels = torch.arange(len(values))
    axes.fill_between(channels, _FLOOR, values.clamp_min(_FLOOR), step="mid", color=color, lw=0)
    # A single channel among thousands is thinner than a pixel, but the outliers are the point of the figure.
    high = values > _OUTLIER * median
    axes.vlines(channels[high], _FLOOR, values[high], color=color, lw=1.4)
    axes.axhline(median, color="black", linewidth=0.9, linestyle=(0, (4, 3)))
    axes.set_xlim(-0.01 * len(values), 1.01 * len(values))
    axes.text(
        0.985, 0.93, f"largest {short_number(float(values.max()))} = "
        f"{short_number(peak_to_median(values))} x median (dashed)",
        transform=axes.transAxes, ha="right", va="top", fontsize=9,
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 1.5},
    )  # fmt: skip
    axes.grid(axis="y", alpha=0.25, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def short_number(value: float) -> str:
    """Three significant digits, or a whole number from 100 on."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
