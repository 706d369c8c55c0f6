"""The pictures of a benchmark report (report.py), in colors that the color-blind can tell apart."""

from __future__ import annotations

import io
import itertools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.lib.runner import Row, baselines_of, group_means, grouped
from benchmarks.lib.shapes import m_class
from benchmarks.pages.result_tables import good, layer_name, time_of, tops
from benchmarks.prediction.gpus import GPUS, Gpu, floor, gpu_of

DPI = 100
WIDTH = 12.8  # inches: 1280 pixels
SHAPES = 8  # with a panel of their own, or a color
HEAT_ROWS = 20
LARGE = 290_000  # bytes
#: After Okabe and Ito.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8A7A00")
MARKERS = "os^DvP*X"
QUANTIZER_TARGET = 0.9
#: A step of up to this much may be the clock's.
NOISE = 1.03


@dataclass(frozen=True)
class Picture:
    """A file, and in words what it shows."""

    file: str
    title: str
    alt: str


@dataclass(frozen=True)
class Step:
    """More tokens that take less time."""

    shape: str
    m: int
    us: float
    next_m: int
    next_us: float

    def __str__(self) -> str:
        times = f"{self.us:,.1f} us at M {self.m}, {self.next_us:,.1f} us at M {self.next_m}"
        return f"{self.shape}: {times} ({100 * (self.us / self.next_us - 1):.1f} % more)"


def by_shape(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows that count, of layers those `per_token` without smoothing, by layer; each by M. First measured first."""
    found: dict[str, list[Row]] = {}
    for row in good(rows):
        if row.get("scheme", "per_token") == "per_token" and not row.get("smooth"):
            found.setdefault(layer_name(row), []).append(row)
    return {shape: sorted(group, key=lambda row: row["M"]) for shape, group in found.items()}


def steps(rows: Sequence[Row]) -> list[Step]:
    """Every non-monotone step between neighboring M, however small."""
    return [
        Step(shape, a["M"], time_of(a) or 0.0, b["M"], time_of(b) or 0.0)
        for shape, group in by_shape(rows).items()
        for a, b in itertools.pairwise(group)
        if (time_of(a) or 0.0) > (time_of(b) or 0.0)
    ]


def data_sheet(machine: Mapping[str, Any]) -> Gpu | None:
    """None where the GPU is not exactly one of gpus.GPUS: PCIe cards, smaller memories, parts of a GPU."""
    try:
        gpu = GPUS[gpu_of(machine)]
    except ValueError:
        return None
    size = re.search(r"(\d+)GB", gpu.name)
    gigabytes = (machine.get("memory_gib") or 0) * 2**30 / 1e9
    same_memory = not size or abs(gigabytes / int(size[1]) - 1) < 0.15
    return gpu if machine.get("sms") == gpu.sms and same_memory else None


def roofline(gpu: Gpu, m: int, n: int, k: int, moved: int | None = None) -> float:
    """TOPS that no kernel can exceed: the peak, or what the fewest bytes allow (default: those with 16-bit y)."""
    if moved is None:
        return 2e-6 * m * n * k / floor(gpu, m, n, k)[0]
    return min(gpu.tops, 2e-3 * m * n * k / moved * gpu.gb_per_s)


# --- drawing ----------------------------------------------------------------------------------------------------------


def _figure(height: float) -> Any:
    # The object interface, not pyplot: no global state and no display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _panels(figure: Any, count: int, columns: int, **options: Any) -> Sequence[Any]:
    """`count` axes in rows of `columns`; what is left of the last row is hidden."""
    grid = figure.subplots(math.ceil(count / columns), columns, squeeze=False, **options).flatten()
    for axes in grid[count:]:
        axes.set_visible(False)
    return list(grid[:count])


def _picture(figure: Any, title: str, head: str, path: Path, alt: str) -> Picture:
    figure.suptitle(f"{title}\n{head}", fontsize=10.5, ha="left", x=0.01)
    _save(figure, path)
    return Picture(path.name, title, alt)


def _save(figure: Any, path: Path) -> None:
    """At once or not at all. A large picture gets a palette, which takes a third of the bytes."""
    from PIL import Image

    raw = io.BytesIO()
    figure.savefig(raw, format="png", pil_kwargs={"optimize": True})
    if raw.tell() > LARGE:
        image = Image.open(raw).convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE)
        raw = io.BytesIO()
        image.save(raw, format="png", optimize=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_bytes(raw.getvalue())
    temporary.replace(path)


def _tokens_axis(axes: Any, tokens: Sequence[int]) -> None:
    from matplotlib.ticker import FixedLocator, NullLocator

    axes.set_xscale("log", base=2)
    shown = sorted(set(tokens))
    axes.xaxis.set_major_locator(FixedLocator(shown[:: math.ceil(len(shown) / 8)]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0f}")
    axes.grid(alpha=0.3, lw=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def _float_name(rows: Sequence[Row]) -> str:
    """What the line beside ours is: FP16, on a CPU float32."""
    names = baselines_of(rows)
    return next((name for name in ("fp16", "float16", "float32") if name in names), "")


def speed(rows: Sequence[Row], machine: Mapping[str, Any], head: str, path: Path) -> Picture:
    """TOPS against M, a panel for each shape."""
    shapes, gpu, other = by_shape(rows), data_sheet(machine), _float_name(rows)
    shown = dict(list(shapes.items())[:SHAPES])
    best = max(tops(row) for group in shown.values() for row in group)
    unit, factor = ("TOPS", 1.0) if best >= 1 else ("GOPS", 1e3)
    columns = min(4, len(shown))
    lines = math.ceil(len(shown) / columns)
    figure = _figure(0.9 + 2.9 * lines)
    panels = _panels(figure, len(shown), columns, sharex=True)
    for axes, (shape, group) in zip(panels, shown.items(), strict=False):
        m = [row["M"] for row in group]
        if gpu:
            floor = [roofline(gpu, row["M"], row["N"], row["K"], row.get("bytes")) for row in group]
            axes.plot(
                m, floor, color="#555555", ls=(0, (4, 2)), lw=1.2, label="roofline (data sheet)"
            )
        line = [(row["M"], row[f"{other}_us"], row) for row in group if row.get(f"{other}_us")]
        axes.plot(
            [m for m, *_ in line], [2e-6 * m * r["N"] * r["K"] / us * factor for m, us, r in line],
            color=COLORS[1], marker="s", ms=4, lw=1.3, label=other,
        )  # fmt: skip
        axes.plot(
            m, [tops(row) * factor for row in group], color=COLORS[0], marker="o", ms=4, lw=1.8, label="int8",
        )  # fmt: skip
        _tokens_axis(axes, [row["M"] for rows in shown.values() for row in rows])
        axes.set_ylim(bottom=0)
        axes.set_title(f"{shape}, {group[0]['N']} x {group[0]['K']}", fontsize=9.5, loc="left")
    for place in range(len(shown)):
        if place % columns == 0:
            panels[place].set_ylabel(unit)
        if place + columns >= len(shown):
            panels[place].set_xlabel("M (tokens)")
            panels[place].tick_params(labelbottom=True)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=10)
    left = f" (the first {len(shown)} of {len(shapes)} shapes)" if len(shapes) > len(shown) else ""
    sheet = (
        f"roofline of {gpu.name}" if gpu else "no roofline: no data sheet of this machine is known"
    )
    title = f"{unit} against M{left}; {sheet}"
    alt = f"{unit} of int8 and {other} against the number of tokens, by layer."
    return _picture(figure, title, head, path, alt)


def heat(rows: Sequence[Row], head: str, path: Path) -> Picture:
    """Speed-ups, shapes x M, one panel for each baseline that ran; the colors part at 1."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    shapes = by_shape(rows)
    shown = dict(list(shapes.items())[:HEAT_ROWS])
    kept = [row for group in shown.values() for row in group]
    names = [name for name in baselines_of(kept) if any(row.get(f"vs_{name}") for row in kept)]
    tokens = sorted({row["M"] for row in kept})
    columns = min(2, len(names))
    lines = math.ceil(len(names) / columns)
    figure = _figure(1.2 + lines * (0.65 + 0.21 * max(3, len(shown))))
    panels = _panels(figure, len(names), columns, sharey=True)
    # Of log2: half as fast .. twice as fast. Few colors, so that a palette holds them all.
    scale = colormaps["RdBu"].resampled(41).with_extremes(bad="#bbbbbb")
    colors = ScalarMappable(Normalize(-1, 1), scale)
    size = 8 if len(tokens) <= 10 else 6.5
    for axes, name in zip(panels, names, strict=False):
        found = {(layer_name(r), r["M"]): r.get(f"vs_{name}") for r in kept}
        values = [[found.get((shape, m)) for m in tokens] for shape in shown]
        axes.imshow(
            [[math.log2(v) if v else math.nan for v in line] for line in values],
            cmap=scale, norm=colors.norm, aspect="auto", interpolation="nearest",
        )  # fmt: skip
        for y, line in enumerate(values):
            for x, value in enumerate(line):
                dark = bool(value) and abs(math.log2(value or 1)) > 0.7
                axes.text(
                    x, y, f"{value:.2f}" if value else "-", ha="center", va="center", fontsize=size,
                    color="white" if dark else "black",
                )  # fmt: skip
        axes.set_xticks(range(len(tokens)), [str(m) for m in tokens], fontsize=8)
        axes.set_yticks(range(len(shown)), list(shown), fontsize=8)
        axes.set_title(f"times as fast as {name}", fontsize=10, loc="left")
        axes.set_xlabel("M (tokens)", fontsize=9)
    bar = figure.colorbar(colors, ax=list(panels), shrink=0.8, aspect=40, pad=0.01, extend="both")
    bar.set_ticks([-1, -0.5, 0, 0.5, 1], labels=["0.50", "0.71", "1", "1.41", "2.00"])
    left = f" (the first {len(shown)} of {len(shapes)} shapes)" if len(shapes) > len(shown) else ""
    title = f"Times as fast as each baseline{left}; white: equally fast, blue: int8 is faster"
    alt = f"Speed-ups by layer and tokens against {', '.join(names)}."
    return _picture(figure, title, head, path, alt)


def latency(rows: Sequence[Row], head: str, path: Path) -> Picture:
    """Microseconds against M, all shapes; every step where more tokens take less time is ringed."""
    shapes, found = by_shape(rows), steps(rows)
    figure = _figure(5.6)
    axes = figure.subplots()
    for place, (shape, group) in enumerate(shapes.items()):
        colored = place < SHAPES
        axes.plot(
            [row["M"] for row in group], [time_of(row) for row in group],
            color=COLORS[place] if colored else "#bbbbbb", marker=MARKERS[place] if colored else None,
            ms=5, lw=1.4 if colored else 0.8, zorder=2 if colored else 1,
            label=shape if colored else None if place > SHAPES else f"{len(shapes) - SHAPES} further shapes",
        )  # fmt: skip
    for size, least, most, label in (
        (7, 1.0, NOISE, f"up to {100 * (NOISE - 1):.0f} %"),
        (14, NOISE, math.inf, "more"),
    ):
        ringed = [s for s in found if least < s.us / s.next_us <= most]
        axes.plot(
            [s.m for s in ringed], [s.us for s in ringed], ls="", marker="o", ms=size, mfc="none", mec="black",
            mew=1.6, zorder=3, label=f"slower than a larger M: {label}" if ringed else None,
        )  # fmt: skip
    axes.set_yscale("log")
    _tokens_axis(axes, [row["M"] for group in shapes.values() for row in group])
    axes.set_xlabel("M (tokens)")
    axes.set_ylabel("microseconds")
    axes.legend(fontsize=9, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    said = f"{len(found)} steps are not monotone (ringed)" if found else "monotone everywhere"
    title = f"Latency against M: {said}"
    alt = f"Microseconds against tokens of {len(shapes)} layers; {said}."
    return _picture(figure, title, head, path, alt)


Bars = tuple[str, dict[str, dict[str, float]]]  # a title; group -> baseline -> times as fast


def means_of(rows: Sequence[Row], name: Callable[[Row], str]) -> dict[str, dict[str, float]]:
    """Geometric means of every ratio, by name."""
    found = group_means(grouped(rows, name), {b: f"vs_{b}" for b in baselines_of(rows)})
    for means in found.values():
        del means["cases"]
    return {group: means for group, means in found.items() if means}


def bars_of(files: Mapping[str, Mapping[str, Any]]) -> list[Bars]:
    """What is shown as bars, of the files that are there."""
    found: list[Bars] = []
    if "quantize" in files:
        kept = ("producer", "M", "vs_copy")
        rows = [{name: r.get(name) for name in kept} for r in good(files["quantize"]["rows"])]
        for what, group in (
            ("M >= 2048", [r for r in rows if r["M"] >= 2048]),
            ("M < 2048", [r for r in rows if r["M"] < 2048]),
        ):
            means = means_of(group, lambda r: str(r["producer"]))
            found.append((f"quantizers, {what}: of a copy's speed", means))
    if "linear" in files:
        rows = [r for group in by_shape(files["linear"]["rows"]).values() for r in group]
        rows.sort(key=lambda r: r["M"])
        means = means_of(rows, lambda r: m_class(r["M"]))
        found.append(("layers with their quantization", means))
    for name in ("block", "model"):
        if name in files:
            rows = [r for r in files[name]["rows"] if baselines_of([r])]
            found.append((f"{name}s", means_of(rows, whole_name)))
    return [(title, means) for title, means in found if means]


def whole_name(row: Row) -> str:
    """Of a block or model: its words and sizes before anything measured."""
    parts = []
    for key, value in row.items():
        if isinstance(value, float) or key in ("rounds", "layers") or key.endswith(("us", "bytes")):
            break
        if isinstance(value, str):
            parts.append(value)
        elif value and not isinstance(value, bool):
            parts.append(f"{key} {value}")
    return " ".join(parts)


def bars(files: Mapping[str, Mapping[str, Any]], head: str, path: Path) -> Picture | None:
    """Horizontal bars, a panel for each kind; None if there is nothing to show."""
    kinds = bars_of(files)
    if not kinds:
        return None
    columns = min(2, len(kinds))
    lines = [kinds[i : i + columns] for i in range(0, len(kinds), columns)]
    heights = [
        max(sum(len(v) + 0.7 for v in means.values()) for _, means in line) for line in lines
    ]
    figure = _figure(min(30.0, 1.0 + sum(0.7 + 0.2 * h for h in heights)))
    panels = _panels(figure, len(kinds), columns, height_ratios=[h + 3 for h in heights])
    for axes, (title, means) in zip(panels, kinds, strict=False):
        names = list(dict.fromkeys(name for values in means.values() for name in values))
        y, ticks = 0.0, []
        for values in means.values():
            ticks.append(y + (len(values) - 1) / 2)
            for name, value in values.items():
                color = COLORS[names.index(name) % len(COLORS)]
                axes.barh(y, value, height=0.9, color=color)
                said = f"{value:.2f}" if len(names) == 1 else f"{value:.2f}x {name}"
                box = {"facecolor": "white", "edgecolor": "none", "pad": 0.8}
                axes.annotate(
                    said, (value, y), (5, 0), textcoords="offset points", va="center", fontsize=8, bbox=box,
                )  # fmt: skip
                y += 1
            y += 0.7
        axes.set_yticks(ticks, list(means), fontsize=8)
        axes.invert_yaxis()
        copy = names == ["copy"]
        axes.axvline(QUANTIZER_TARGET if copy else 1.0, color="black", lw=1.2, ls=(0, (4, 2)))
        dashed = f" (dashed: {QUANTIZER_TARGET})" if copy else ""
        axes.set_title(title + dashed, fontsize=10, loc="left")
        most = max(value for values in means.values() for value in values.values())
        axes.set_xlim(0, max(1.1, (1.1 if copy else 1.4) * most))
        axes.spines[["top", "right"]].set_visible(False)
    title = "Times as fast: " + ", ".join(dict.fromkeys(title.split(",")[0] for title, _ in kinds))
    alt = f"{title}; the numbers are in the tables."
    return _picture(figure, title, f"(geometric means) {head}", path, alt)


def draw(files: Mapping[str, Mapping[str, Any]], head: str, folder: Path) -> list[Picture]:
    """At most four files: the first three of GEMMs, or of layers where no GEMM was measured."""
    pictures = []
    main = next(
        (name for name in ("gemm", "linear") if name in files and by_shape(files[name]["rows"])),
        None,
    )
    if main:
        rows = files[main]["rows"]
        named = ("GEMM; " if main == "gemm" else "layers with their quantization; ") + head
        pictures.append(speed(rows, files[main]["machine"], named, folder / "speed.png"))
        if any(row.get(f"vs_{name}") for name in baselines_of(rows) for row in rows):
            pictures.append(heat(rows, named, folder / "speedup.png"))
        pictures.append(latency(rows, named, folder / "latency.png"))
    last = bars(files, head, folder / "bars.png")
    return [*pictures, last] if last else pictures
