"""Tables of what the benchmarks measured, from their results files: for the documentation and for reports.

Every number is the file's; means are geometric. A case that failed has no numbers and is named by `failures`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import tune_rules
from prediction import compare, expected, gpus
from report import Row, baselines_of, geomean, geomeans
from shapes import m_class

#: The times that a row may have, the op's own first: `us` of an op, `int8_us` of a layer.
TIMES = ("us", "int8_us", "w8a8_us")
#: The models of the project's targets: at these shapes it is judged whether they are met.
TARGET_MODELS = ("LLaMA-7B", "LLaMA-70B", "OPT-13B", "OPT-30B", "OPT-66B")
#: What stays out of a table of any rows: how exactly something was timed, and under which clocks.
ASIDE = ("rounds", "calls", "bytes", "sm_mhz", "memory_mhz", "watts", "celsius")

#: Columns whose values say what they are.
NAMED_BY_VALUE = ("model", "layer", "producer", "scheme", "dtype", "data", "phase")


@dataclass(frozen=True)
class Table:
    """The first `left` columns are text, the others numbers."""

    header: list[str]
    rows: list[list[str]]
    left: int = 1

    def markdown(self) -> str:
        return markdown(self.header, self.rows, self.left)

    def text(self) -> str:
        """Aligned, for a terminal."""
        lines = [self.header, *self.rows]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        made = [
            "  ".join(
                cell.ljust(width) if i < self.left else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in lines
        ]
        return "\n".join(made) + "\n"


def markdown(header: list[str], rows: list[list[str]], left: int = 1) -> str:
    """A table whose first `left` columns are text and the others numbers."""
    rule = ["---"] * left + ["---:"] * (len(header) - left)
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, rule, *rows)) + "\n"


# --- rows -------------------------------------------------------------------------------------------------------------


def time_of(row: Mapping[str, Any]) -> float | None:
    """Microseconds of what is measured; None where it failed, or is measured in something else."""
    return next((row[name] for name in TIMES if row.get(name)), None)


def failed(row: Mapping[str, Any]) -> str:
    """Empty, or what went wrong: of the op, or of a tile beside it."""
    for name in ("wrong", "failed"):
        if name in row:
            return f"{name}: {row[name]}"
    wrong = row.get("tiles_wrong", {})
    return "; ".join(f"tile {tile} wrong: {why}" for tile, why in wrong.items())


def failures(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    return [f"{case_name(row)}: {why}" for row in rows if (why := failed(row))]


def case_name(row: Mapping[str, Any]) -> str:
    """`LLaMA-7B up M 64 N 11008 K 4096`, of any benchmark."""
    parts = []
    for key, value in row.items():
        if key in (*TIMES, *ASIDE, "wrong", "failed") or key.startswith("vs_"):
            break  # the key's columns come first
        if isinstance(value, (str, int)) and value not in ("", False, "random"):
            named = isinstance(value, bool) or key in NAMED_BY_VALUE
            parts.append(f"{key} {value}" if not named else key if value is True else str(value))
    return " ".join(parts)


def layer_name(row: Mapping[str, Any]) -> str:
    """The GEMM's rows keep the model apart, the layers' do not."""
    return f"{row.get('model', '')} {row.get('layer', '')}".strip()


def good(rows: Iterable[Row]) -> list[Row]:
    """Those with a time; of the GEMM those with random data, which all cases have."""
    return [row for row in rows if time_of(row) and row.get("data", "random") == "random"]


def number(value: float | None, digits: int = 1, unit: str = "") -> str:
    return "-" if value is None else f"{value:,.{digits}f}{unit}"


def times(value: float | None) -> str:
    return number(value, 2, "x")


def tops(row: Mapping[str, Any]) -> float:
    """The file's; of a layer's row, which has GOPS, a thousandth of that."""
    return float(row["tops"] if "tops" in row else row["gops"] / 1e3)


def documented(rows: Sequence[Row]) -> list[Row]:
    """The layers of the predictions, so that both can be compared; all where a file has none of them."""
    return [row for row in rows if layer_name(row) in expected.LAYERS] or list(rows)


# --- tables -----------------------------------------------------------------------------------------------------------


def gemm(data: Mapping[str, Any], every: bool = False) -> Table:
    rows = [row for row in data["rows"] if time_of(row)] if every else good(data["rows"])
    names = baselines_of(rows)
    header = ["layer", "N x K", "tile", "M", "us", "TOPS", "GB/s", *(f"vs {n}" for n in names)]
    body = [
        [
            layer_name(row) + (" (real data)" if row.get("data") == "real" else ""),
            f"{row['N']} x {row['K']}",
            str(row.get("tile", "-")),
            str(row["M"]),
            number(time_of(row)),
            number(tops(row)),
            number(row.get("gb_per_s")),
            *(times(row.get(f"vs_{name}")) for name in names),
        ]
        for row in (rows if every else documented(rows))
    ]
    return Table(header, body, left=3)


def means(data: Mapping[str, Any]) -> Table:
    """Of GEMMs or layers, by class of M: how many cases, and how many times as fast as each baseline."""
    rows = good(data["rows"])
    names = baselines_of(rows)
    columns = [f"vs_{name}" for name in names]
    body = [
        [name, str(found["cases"]), *(times(found.get(column)) for column in columns)]
        for name, found in geomeans(rows, columns).items()
    ]
    return Table(["M", "cases", *(f"vs {n}" for n in names)], body)


def quantize(data: Mapping[str, Any], every: bool = False) -> Table:
    """In the documentation: float16, per token, without the division by s, and the first width of a producer."""
    rows = good(data["rows"])
    if not every:
        plain = [r for r in rows if (r["dtype"], r["scheme"]) == ("float16", "per_token")]
        rows = [r for r in plain if not r["smooth"]] or rows
        first = {r["producer"]: r["K"] for r in reversed(rows)}
        rows = [r for r in rows if r["K"] == first[r["producer"]]]
        rows.sort(key=lambda r: (list(first).index(r["producer"]), r["M"]))
    names = baselines_of(rows)
    header = ["producer", "scheme", "M", "K", "us", "GB/s", *(f"vs {n}" for n in names)]
    body = [
        [
            f"{row['producer']} {row['dtype']}",
            row["scheme"] + ("+smooth" if row["smooth"] else ""),
            str(row["M"]),
            str(row["K"]),
            number(row["us"]),
            number(row["gb_per_s"]),
            *(times(row.get(f"vs_{name}")) for name in names),
        ]
        for row in rows
    ]
    return Table(header, body, left=2)


def linear(data: Mapping[str, Any], every: bool = False) -> Table:
    """Whole layers. In the documentation: per token, with and without the division by s."""
    rows = good(data["rows"])
    if not every:
        rows = documented([r for r in rows if r.get("scheme") in (None, "per_token")])
    names = baselines_of(rows)
    header = ["layer", "N x K", "scheme", "M", "us", "TOPS", *(f"vs {n}" for n in names), "host us"]
    body = [
        [
            layer_name(row),
            f"{row['N']} x {row['K']}",
            row.get("scheme", "per_token") + ("+smooth" if row.get("smooth") else ""),
            str(row["M"]),
            number(time_of(row)),
            number(tops(row), 3 if tops(row) < 1 else 1),
            *(times(row.get(f"vs_{name}")) for name in names),
            number(row.get("host_us")),
        ]
        for row in rows
    ]
    return Table(header, body, left=3)


def anything(data: Mapping[str, Any]) -> Table:
    """Blocks and models: the columns as the file has them, words first.

    Percentiles, clocks and the baselines' own times stay in the file, and so does what no row has (a CPU's peak).
    """
    rows = [row for row in data["rows"] if not failed(row)]
    aside = {*ASIDE, *(f"{name}_us" for name in baselines_of(rows))}
    columns = dict.fromkeys(
        name
        for row in rows
        for name, value in row.items()
        if isinstance(value, (str, int, float)) or name.startswith("vs_")
        if name not in aside and not name.endswith(("_p20", "_p80", "_missing"))
    )
    text = [c for c in columns if all(isinstance(r.get(c), (str, bool)) for r in rows if c in r)]
    order = [*text, *(c for c in columns if c not in text)]
    header = [name.replace("vs_", "vs ").replace("_", " ") for name in order]
    return Table(header, [[_cell(c, row.get(c)) for c in order] for row in rows], left=len(text))


def _cell(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        if name.startswith("vs_"):
            return times(value)
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return "-" if value is None else str(value)


def tuned(data: Mapping[str, Any]) -> Table:
    """What the dispatch loses against the best tile."""
    usable = [r for r in data["results"] if r.get("times")]
    means = tune_rules.loss_means(usable)
    counts = {m: sum(m in ("all", m_class(r["M"])) for r in usable) for m in means}
    body = [[m, str(counts[m]), f"{100 * (loss - 1):.1f} %"] for m, loss in means.items()]
    return Table(["M", "problems", "the dispatch loses"], body)


def predicted(data: Mapping[str, Any]) -> Table | None:
    """Measured over expected; None on a GPU that is not predicted. Needs the C++ compiler."""
    try:
        gpu = gpus.gpu_of(data["machine"])
    except ValueError:
        return None
    return Table(*compare.by_class(compare.compare(data, gpu)))


# --- targets ----------------------------------------------------------------------------------------------------------


def _of_models(rows: Sequence[Row]) -> list[Row]:
    return [r for r in rows if any(layer_name(r).startswith(f"{m} ") for m in TARGET_MODELS)]


def targets(files: Mapping[str, Mapping[str, Any]]) -> Table:
    """The project's targets against what "gemm", "linear" and "quantize" measured.

    Met is what every case meets; a target that only the geometric mean meets is "on average".
    """
    rows = {
        name: list(files[name]["rows"]) if name in files else []
        for name in ("gemm", "linear", "quantize")
    }
    ops = [r for r in _of_models(rows["gemm"]) if r.get("data", "random") == "random"]
    large, small = [r for r in ops if r["M"] >= 2048], [r for r in ops if r["M"] <= 64]
    layers = [r for r in _of_models(rows["linear"]) if r.get("scheme") == "per_token"]
    quantisers = rows["quantize"]
    body = [
        _target("GEMM, M >= 2048, vs FP16", 1.7, large, "vs_fp16", times),
        _target("GEMM, M >= 2048, TOPS", 1300, large, "tops", lambda v: number(v, 0)),
        _target("GEMM, M <= 64, vs FP16", 1.9, small, "vs_fp16", times),
        _target("layer with its quantisation, vs FP16", 1.6, layers, "vs_float16", times),
        _target("quantisers, speed of a copy", 0.9, quantisers, "vs_copy", times),
    ]
    many = [r for r in quantisers if r["M"] >= 2048]
    body.append(_target("the same, M >= 2048 only", 0.9, many, "vs_copy", times))
    return Table(["what", "met", "target", "measured", "least", "cases that meet it"], body, left=2)


def _target(what: str, least: float, rows: Sequence[Row], column: str, show: Any) -> list[str]:
    """A case that failed, or whose baseline did not run, meets nothing."""
    values = [row[column] for row in rows if row.get(column)]
    if not values:
        return [what, "not measured", show(least), "-", "-", "-"]
    meet, mean = sum(value >= least for value in values), geomean(values)
    met = "yes" if meet == len(rows) else "on average" if mean >= least else "no"
    return [what, met, show(least), show(mean), show(min(values)), f"{meet} of {len(rows)}"]
