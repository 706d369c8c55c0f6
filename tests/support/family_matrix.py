"""docs/reference/families.md: a matrix of families and groups of linears, with reasons as footnotes."""

from __future__ import annotations

import re
from typing import Any

import transformers as t

from smoothquant_kernels.nn.float_linear import is_float_linear
from tests.support.families import FAMILIES
from tests.support.family_table import TABLE, role, smoothed, table
from tools.build.plan import ROOT

PATH = ROOT / "docs" / "reference" / "families.md"

# The column of a linear, by the end of its name without numbers; the first expression that matches counts.
_QKV = r"(q|k|v|query|key|value|qkv|q_a|q_b|kv_b|pos_key|pos_query)"
GROUPS = {
    "MLP output": r"(down_proj|fc2|fc_out|dense_4h_to_h|lin2|DenseReluDense\.wo|mlp\.c_proj|layer\.output\.dense)",
    "MLP input": r"((gate|up|gate_up)_proj|fc1|fc_in|dense_h_to_4h|c_fc|lin1|DenseReluDense\.wi(_[01])?"
    r"|intermediate\.dense)",
    "attention output": r"(o_proj|out_proj|out_lin|(Self|EncDec)Attention\.o|attn\.c_proj|attention\.output\.dense"
    r"|(self_attention|attention|self_attn)\.dense)",
    "queries, keys, values": rf"({_QKV}(_proj|_lin)?|query_key_value|c_attn|Wqkv|kv_a_proj_with_mqa|in_proj_\w+)",
}
COLUMNS = [*reversed(GROUPS), "other linears", "experts", "left in float"]

_INTRO = """# Architectures

The table shows what `smooth_lm` does to each architecture, tested on a tiny random model of it (two layers, hidden size
32). The driver has no list of families. It traces which linears read one tensor, and proves on the given model which
modules can absorb their factors ([smoothing](../guides/smoothing.md)). A model that is not listed takes the same steps.

* *norm*: 1 / s is folded into the weight of the preceding norm.
* *linear*: 1 / s is folded into the rows of an earlier linear (`v_proj`, `up_proj`, `fc1`).
* *run time*: the quantizer multiplies by 1 / s while it reads the input. That is always exact. The footnote says why.

"aten.add reads it": a residual branch reads the same tensor, so folding would change what it reads. "aten.mm reads it":
a router or an expert reads it too. A test checks every row. The smoothed model's outputs must equal the float model's
bit for bit (with factors that are powers of two; relative 1e-5 without that rounding). Every linear must be in one of
the columns. *Experts* are those whose matrices are one parameter ([mixtures](../guides/experts.md)). The routers of
mixtures of experts must give the same logits. The int8 model must stay near the float one.

Written by `python -m tests.support.family_table --write`, with transformers {version}.
"""


class Footnotes:
    """Numbers reasons in the order of their first use."""

    def __init__(self) -> None:
        self.reasons: dict[str, int] = {}

    def mark(self, reason: str) -> str:
        number = self.reasons.setdefault(reason, len(self.reasons) + 1)
        return f"[^{number}]"

    def text(self) -> str:
        return "".join(
            f"[^{number}]: {reason[0].upper()}{reason[1:]}.\n"
            for reason, number in self.reasons.items()
        )


def group(name: str) -> str:
    """The column of a linear."""
    return next(
        (g for g, ends in GROUPS.items() if re.search(rf"(^|\.){ends}$", name)), "other linears"
    )


def _reason(text: str) -> str:
    """The reason without the producer's name, which differs from layer to layer."""
    return re.sub(r"^\S+ is read by", "its producer is read by", text)


def _cells(family: str, notes: Footnotes) -> list[str]:
    outcome = smoothed(family)
    found: dict[str, dict[str, None]] = {column: {} for column in COLUMNS}
    for layer in outcome.info["layers"]:
        name = role(layer["name"])
        column = group(name)
        outcomes = found[column]
        text = _outcome(layer, outcome.model, notes)
        outcomes[
            f"`{'.'.join(name.split('.')[-2:])}`: {text}" if column == "other linears" else text
        ] = None
    for entry in outcome.info.get("experts", ()):
        last = role(entry["name"]).split(".")[-1]
        found["experts"][f"`{last}`: {_outcome(entry, outcome.model, notes)}"] = None
    for entry in outcome.info["skipped"]:
        last = role(entry["name"]).split(".")[-1]
        found["left in float"][f"`{last}`{notes.mark(entry['reason'])}"] = None
    return [", ".join(found[column]) for column in COLUMNS]


def _outcome(layer: dict[str, Any], model: Any, notes: Footnotes) -> str:
    if layer["smoothing"] == "folded":
        producer = model.get_submodule(layer["reason"].removeprefix("into "))
        return "linear" if is_float_linear(producer) else "norm"
    assert layer["smoothing"] == "runtime", layer
    return f"run time{notes.mark(_reason(layer['reason']))}"


def page() -> str:
    """The text of docs/reference/families.md."""
    notes = Footnotes()
    lines = [_INTRO.format(version=t.__version__), "| family | " + " | ".join(COLUMNS) + " |"]
    lines.append("|---" * (len(COLUMNS) + 1) + "|")
    for family in FAMILIES:
        name = type(smoothed(family).model).__name__
        lines.append(f"| {family} (`{name}`) | " + " | ".join(_cells(family, notes)) + " |")
    return "\n".join([*lines, "", notes.text()])


def write() -> None:
    PATH.write_text(page(), encoding="utf-8")
    TABLE.parent.mkdir(exist_ok=True)
    TABLE.write_text(table(), encoding="utf-8")
