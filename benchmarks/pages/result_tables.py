"""Tables of what the benchmarks measured, from their results files: for the documentation and for reports.

Every number is the file's; means are geometric. A case that failed has no numbers and is named by `failures`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.lib.runner import Row, baselines_of, by_class, geomean, geomeans
from benchmarks.prediction import compare, expected, gpus
from benchmarks.tuner import rules
from benchmarks.tuner.choices import timed

#: The times that a row may have, the op's own first: `us` of an op, `int8_us` of a layer.
TIMES = ("us", "int8_us", "w8a8_us")
#: The models of the project's targets: at these shapes it is judged whether they are met.
TARGET_MODELS = ("LLaMA-7B", "LLaMA-70B", "OPT-13B", "OPT-30B", "OPT-66B")
#: What stays out of a table of any rows: how exactly something was timed, and under which clocks.
ASIDE = ("rounds", "calls", "bytes", "sm_mhz", "memory_mhz", "watts", "celsius")

#: Columns whose values say what they are.
NAMED_BY_VALUE = ("op", "model", "layer", "producer", "scheme", "dtype", "data", "phase")


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

Column = Callable[[Row], str]


def table_of(
    rows: Sequence[Row], words: Mapping[str, Column], numbers: Mapping[str, Column]
) -> Table:
    """Columns of words, of numbers, and how many times as fast as each baseline."""
    versus = {
        f"vs {name}": lambda row, name=name: times(row.get(f"vs_{name}"))
        for name in baselines_of(rows)
    }
    after = {"host us": numbers["host us"]} if "host us" in numbers else {}
    columns = {**words, **{n: c for n, c in numbers.items() if n not in after}, **versus, **after}
    body = [[column(row) for column in columns.values()] for row in rows]
    return Table(list(columns), body, left=len(words))


def shape(row: Row) -> str:
    return f"{row['N']} x {row['K']}"


def gemm(data: Mapping[str, Any], every: bool = False) -> Table:
    rows = [row for row in data["rows"] if time_of(row)] if every else good(data["rows"])

    def layer(row: Row) -> str:
        return layer_name(row) + (" (real data)" if row.get("data") == "real" else "")

    return table_of(
        rows if every else documented(rows),
        {"layer": layer, "N x K": shape, "tile": lambda row: str(row.get("tile", "-"))},
        {
            "M": lambda row: str(row["M"]),
            "us": lambda row: number(time_of(row)),
            "TOPS": lambda row: number(tops(row)),
            "GB/s": lambda row: number(row.get("gb_per_s")),
        },
    )


def means(data: Mapping[str, Any]) -> Table:
    """Of GEMMs or layers, by class of M: how many cases, and how many times as fast as each baseline."""
    rows = good(data["rows"])
    names = baselines_of(rows)
    body = [
        [name, str(found["cases"]), *(times(found.get(f"vs_{n}")) for n in names)]
        for name, found in geomeans(rows, [f"vs_{name}" for name in names]).items()
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
    words = {"producer": lambda row: f"{row['producer']} {row['dtype']}", "scheme": scheme}
    numbers = {
        "M": lambda row: str(row["M"]),
        "K": lambda row: str(row["K"]),
        "us": lambda row: number(row["us"]),
        "GB/s": lambda row: number(row["gb_per_s"]),
    }
    return table_of(rows, words, numbers)


def scheme(row: Row) -> str:
    return str(row.get("scheme", "per_token")) + ("+smooth" if row.get("smooth") else "")


def linear(data: Mapping[str, Any], every: bool = False) -> Table:
    """Whole layers. In the documentation: per token, with and without the division by s."""
    rows = good(data["rows"])
    if not every:
        rows = documented([r for r in rows if r.get("scheme") in (None, "per_token")])
    numbers = {
        "M": lambda row: str(row["M"]),
        "us": lambda row: number(time_of(row)),
        "TOPS": lambda row: number(tops(row), 3 if tops(row) < 1 else 1),
        "host us": lambda row: number(row.get("host_us")),
    }
    return table_of(rows, {"layer": layer_name, "N x K": shape, "scheme": scheme}, numbers)


def attention(data: Mapping[str, Any]) -> Table:
    """The int8 cache: attention to it, then its writer."""
    rows = sorted(good(data["rows"]), key=lambda row: str(row["op"]))
    words = {
        "op": lambda row: str(row["op"]),
        "model": lambda row: (
            str(row["model"]) + (f", pages of {row['page']}" if row["page"] else "")
        ),
    }
    numbers: dict[str, Column] = {
        "B": lambda row: str(row["batch"]),
        "T": lambda row: str(row["T"]),
        "context": lambda row: str(row["context"]),
        "us": lambda row: number(row["us"]),
        "GB/s": lambda row: number(row["gb_per_s"]),
    }
    return table_of(rows, words, numbers)


def anything(data: Mapping[str, Any]) -> Table:
    """Blocks and models: the columns as the file has them, words first.

    Percentiles, clocks and the baselines' own times stay in the file, as do columns without a value (a CPU's peak).
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
    classes = by_class([r for r in data["results"] if timed(r)])
    losses = {name: rules.loss_means(group)["all"] for name, group in classes.items()}
    body = [[m, str(len(classes[m])), rules.percent(loss)] for m, loss in losses.items()]
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
    """The project's targets against what "gemm", "linear", "quantize" and "attention" measured.

    Met is what every case meets; a target that only the geometric mean meets is "on average".
    """
    names = ("gemm", "linear", "quantize", "attention")
    rows = {n: list(files[n]["rows"]) if n in files else [] for n in names}
    ops = [r for r in _of_models(rows["gemm"]) if r.get("data", "random") == "random"]
    large, small = [r for r in ops if r["M"] >= 2048], [r for r in ops if r["M"] <= 64]
    layers = [r for r in _of_models(rows["linear"]) if r.get("scheme") == "per_token"]
    many = [r for r in rows["quantize"] if r["M"] >= 2048]
    caches = [r for r in rows["attention"] if r["op"] == "kv_append"]
    long = [r for r in rows["attention"] if r["op"] != "kv_append" and r["context"] >= 8192]
    body = [
        _target("GEMM, M >= 2048, vs FP16", 1.7, large, "vs_fp16", times),
        _target("GEMM, M >= 2048, TOPS", 1300, large, "tops", lambda v: number(v, 0)),
        _target("GEMM, M <= 64, vs FP16", 1.9, small, "vs_fp16", times),
        _target("layer with its quantization, vs FP16", 1.6, layers, "vs_float16", times),
        _target("quantizers, speed of a copy", 0.9, rows["quantize"], "vs_copy", times),
        _target("the same, M >= 2048 only", 0.9, many, "vs_copy", times),
        _target("attention to 8k and more int8 tokens, vs FP16", 1.6, long, "vs_float16", times),
        _target("the same, speed of a copy", 0.8, long, "vs_copy", times),
        _target(
            "writer of prompts, speed of a copy",
            0.8,
            [r for r in caches if r["T"] > 1],
            "vs_copy",
            times,
        ),
    ]
    return Table(["what", "met", "target", "measured", "least", "cases that meet it"], body, left=2)


def _target(what: str, least: float, rows: Sequence[Row], column: str, show: Any) -> list[str]:
    """A case that failed, or whose baseline did not run, meets nothing."""
    values = [row[column] for row in rows if row.get(column)]
    if not values:
        return [what, "not measured", show(least), "-", "-", "-"]
    meet, mean = sum(value >= least for value in values), geomean(values)
    met = "yes" if meet == len(rows) else "on average" if mean >= least else "no"
    return [what, met, show(least), show(mean), show(min(values)), f"{meet} of {len(rows)}"]
