"""The report as one HTML page that contains its styles (`page.css`) and pictures. It uses no script and no network."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template

from smoothquant_kernels.modeling.record import How
from smoothquant_kernels.report.figures import Picture
from smoothquant_kernels.storage.document import Document, readable_size
from smoothquant_kernels.storage.versions import PACKAGE, installed_version

_SMOOTHING: dict[How, str] = {"folded": "folded", "runtime": "run time", "none": "not smoothed"}


def page(
    document: Document, pictures: Mapping[str, Picture], folder: Path, *, advised: str | None = None
) -> str:
    """Returns the whole page.

    Args:
        document: the numbers of the report.
        pictures: the pictures by layer, and ``"sqnr"`` and ``"alpha"``. Their files are in `folder`.
        advised: the name of the file with all the advice as settings, if there is any advice.
    """
    sections = [
        _summary(document),
        _activations(document, pictures, folder),
        _noise(document, pictures, folder),
        _alphas(document, pictures, folder),
        _advice(document, advised),
    ]
    return Template(_part("html")).substitute(
        title=escape(f"SmoothQuant W8A8: {document['model']}"),
        style=_part("css"),
        lead=_lead(document),
        sections="\n".join(sections),
        footer=_footer(),
    )


def _part(kind: str) -> str:
    return Path(__file__).with_suffix(f".{kind}").read_text("utf-8")


# --- pieces -----------------------------------------------------------------------------------------------------------


def _picture(picture: Picture | None, folder: Path, caption: str) -> str:
    if picture is None:
        return ""
    data = base64.b64encode((folder / picture.file).read_bytes()).decode("ascii")
    return (
        f'<figure><img src="data:image/png;base64,{data}" alt="{escape(picture.alt)}" '
        f'width="{picture.width}" height="{picture.height}">'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def _table(
    label: str, head: Sequence[tuple[str, str]], rows: Sequence[Sequence[str]], box: str = "scroll"
) -> str:
    """A table of HTML cells. `head` holds (text, class) of each column, and the first cell of a row names the row."""
    columns = "".join(f'<th scope="col" class="{kind}">{text}</th>' for text, kind in head)
    lines = []
    for row in rows:
        kinds = [kind for _, kind in head]
        cells = f'<th scope="row" class="{kinds[0]}">{row[0]}</th>' + "".join(
            f'<td class="{kind}">{cell}</td>' for kind, cell in zip(kinds[1:], row[1:], strict=True)
        )
        lines.append(f"<tr>{cells}</tr>")
    return (
        f'<div class="{box}" role="region" aria-label="{escape(label)}" tabindex="0"><table>'
        f"<caption>{escape(label)}</caption><thead><tr>{columns}</tr></thead>"
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def _name(text: str) -> str:
    return f'<span class="name">{escape(text)}</span>'


def _db(value: float | None) -> str:
    if value is None:
        return "not called"
    return "exact" if math.isinf(value) else f"{value:.1f}"


def _number(value: float | None, digits: int = 1) -> str:
    return "" if value is None else f"{value:,.{digits}f}"


def _gain(before: float | None, after: float | None) -> str:
    if before is None or after is None or not (math.isfinite(before) and math.isfinite(after)):
        return ""
    gain = after - before
    kind = "better" if gain >= 0.5 else "worse" if gain <= -0.5 else ""
    return f'<span class="{kind}">{gain:+.1f}</span>'


def _fact(what: str, value: str, remark: str = "") -> str:
    small = f"<small>{remark}</small>" if remark else ""
    return f"<div><dt>{what}</dt><dd>{value}{small}</dd></div>"


# --- sections ---------------------------------------------------------------------------------------------------------


def _lead(document: Document) -> str:
    config, summary = document["config"], document["summary"]
    smoothed = "smoothed" if config["smooth"] else "not smoothed"
    own = [f"{len(config[key])} {what}" for key, what in (
        ("alphas", "own alphas"), ("schemes", "own schemes"), ("clips", "own clips")
    ) if config[key]]  # fmt: skip
    alpha = (
        "the default alpha of each layer's scheme"
        if config["alpha"] is None
        else f"alpha {config['alpha']:g}"
    )
    settings = f"activations <code>{escape(config['activation_scheme'])}</code>, weights per "
    settings += f"{escape(config['weight_granularity'])}, {alpha}" + "".join(f", {o}" for o in own)
    return (
        f'<p class="lead">{summary["quantized"]} linear layers in int8, {smoothed}: {settings}.</p>'
    )


def _summary(document: Document) -> str:
    summary = document["summary"]
    facts = [
        _fact(
            "Layers in int8", str(summary["quantized"]),
            f"{summary['folded']} smoothed by folding, {summary['runtime']} at run time, {summary['none']} not; "
            f"{summary['skipped']} left in float",
        ),
        _fact("Change of the float model", *_verification(document["verification"])),
    ]  # fmt: skip
    now, naive = summary["sqnr"], summary["sqnr_naive"]
    if now and naive:
        for key, what in (("median", "Median layer"), ("worst", "Worst layer")):
            facts.append(
                _fact(
                    f"{what}, signal to noise",
                    f"{_db(now[key])} dB",
                    f"{_db(naive[key])} dB without smoothing",
                )
            )
    facts += [_fact(what, *value) for what, value in _evaluation(document["evaluation"])]
    facts += _cache(document["kv_cache"])
    held, data = document["held"], document["calibration"]
    remark = f"calibrated on {data['tokens']:,} tokens"
    remark += f" of {escape(data['source'])}" if data["source"] else ""
    source = f"{escape(held['source'])}; " if held["source"] else ""
    facts.append(_fact("Measured on", f"{held['tokens']:,} tokens", f"{source}{remark}"))
    return f"<section>\n<h2>Summary</h2>\n<dl>{''.join(facts)}</dl>\n</section>"


def _cache(costs: Document | None) -> list[str]:
    """What a cache of keys and values takes, for the longest text that is shown."""
    if costs is None:
        return []
    tokens, sizes = list(costs["bytes"].items())[-1]
    static = f"{readable_size(sizes['int8-static'])} with static scales, "
    return [
        _fact(
            f"Cache of {int(tokens):,} tokens",
            f"{readable_size(sizes['int8'])} in int8",
            f"{static}{readable_size(sizes['float16'])} in float16",
        )
    ]


def _verification(check: Document | None) -> tuple[str, str]:
    if check is None:
        return "none", "nothing was smoothed"
    if check["bit_exact"]:
        return "none", "the smoothed float model's output equals the original's bit for bit"
    return f"{check['relative_change']:.1e}", "largest change of its output by smoothing, relative"


def _evaluation(result: Document | None) -> list[tuple[str, tuple[str, str]]]:
    if result is None:
        return []
    now, exact, naive = result["smoothed"], result["float"], result.get("naive")
    other = f", {naive['perplexity']:.3f} without smoothing" if naive else ""
    facts = [
        ("Perplexity", (f"{now['perplexity']:.3f}", f"{exact['perplexity']:.3f} in float{other}"))
    ]
    other = f"; {naive['mean_kl']:.4f} without smoothing" if naive else ""
    facts.append(("KL divergence from float", (
        f"{now['mean_kl']:.4f}", f"&plusmn; {now['kl_stderr']:.4f} nats per token{other}"
    )))  # fmt: skip
    other = f"; {naive['top1_agreement']:.1%} without smoothing" if naive else ""
    facts.append(("Same most probable token", (
        f"{now['top1_agreement']:.1%}", f"of {now['tokens']:,} tokens{other}"
    )))  # fmt: skip
    return facts


def _activations(document: Document, pictures: Mapping[str, Picture], folder: Path) -> str:
    layers = {layer["name"]: layer for layer in document["layers"]}
    parts = []
    for figure in document["figures"]:
        layer = layers[figure["layer"]]
        others = [n.rsplit(".", 1)[-1] for n in layer["group"] if n != layer["name"]]
        caption = f"scales {escape(layer['activation_scheme'])}, smoothing: {_SMOOTHING[layer['smoothing']]}"
        if layer["alpha"] is not None:
            caption = f"alpha {layer['alpha']:g}, {caption}"
        if others:
            verb = "reads" if len(others) == 1 else "read"
            caption += f"; {escape(', '.join(others))} {verb} the same input"
        parts.append(
            f"<h3>{_name(layer['name'])}</h3>\n"
            + _picture(pictures.get(layer["name"]), folder, caption)
        )
    return (
        "<section>\n<h2>Activations before and after smoothing</h2>\n<p>The layer with the greatest outlier channel of "
        "each kind. Above, the largest magnitude of each input channel over the calibration tokens; below, the "
        "magnitudes of the first tokens that were measured (neighboring channels of wide layers share a column, which "
        "shows the largest). Both sides have the same axes and colors.</p>\n"
        + "\n".join(parts) + "\n</section>"
    )  # fmt: skip


def _noise(document: Document, pictures: Mapping[str, Picture], folder: Path) -> str:
    rows = [
        [
            _name(la["name"]), _db(la["sqnr_naive"]), _db(la["sqnr"]),
            _gain(la["sqnr_naive"], la["sqnr"]), _number(la["channel_peak"]),
            _number(la["channel_peak_smoothed"]), _number(la["x_peak"]),
        ]
        for la in document["layers"]
    ]  # fmt: skip
    return (
        "<section>\n<h2>Quantization noise of each layer</h2>\n<p>SQNR = 10 log<sub>10</sub>(|y|<sup>2</sup> / "
        "|&#375; &minus; y|<sup>2</sup>) over all measured tokens: y is the output of the float layer, &#375; that of "
        "its int8 form on the same input. The noise of earlier layers is not in it. 6 dB more halve the error.</p>\n"
        + _picture(pictures.get("sqnr"), folder, "Higher is better.")
        + _table(
            f"All {len(rows)} layers: SQNR in dB, and what makes layers hard",
            [("layer", "left"), ("without<br>smoothing", ""), ("smoothed", ""), ("gain", ""),
             ("largest / median<br>channel, before", ""), ("after", ""), ("largest / median<br>token", "")],
            rows,
        ) + "\n</section>"
    )  # fmt: skip


def _alphas(document: Document, pictures: Mapping[str, Picture], folder: Path) -> str:
    groups = {tuple(la["group"]): la for la in document["layers"]}
    rows = []
    for members, la in groups.items():
        names = [members[0], *(n.rsplit(".", 1)[-1] for n in members[1:])]
        rows.append([
            _name(", ".join(names)), "" if la["alpha"] is None else f"{la['alpha']:g}",
            escape(la["activation_scheme"]), _SMOOTHING[la["smoothing"]], escape(la["reason"]),
        ])  # fmt: skip
    rows += [
        [_name(s["name"]), "", "", "left in float", escape(s["reason"])]
        for s in document["skipped"]
    ]
    return (
        "<section>\n<h2>How each group of layers is smoothed</h2>\n<p>Layers that read one tensor share their factors. "
        "Folded factors cost nothing; others are divided within the quantizer at run time.</p>\n"
        + _picture(pictures.get("alpha"), folder,
                   "0 leaves the difficulty in the activations, 1 moves it all to the weights.")
        + _table(
            f"{len(groups)} groups, and the layers left in float",
            [("layers", "left"), ("alpha", ""), ("scales", "left"), ("smoothing", "left"), ("how, why", "left")],
            rows,
        ) + "\n</section>"
    )  # fmt: skip


def _advice(document: Document, advised: str | None) -> str:
    rows = [
        [
            _name(entry["layer"]), _db(entry["sqnr"]),
            _db(entry["sqnr_then"]) if entry["settings"] else "",
            escape(entry["text"]), _tried(entry), f"+{readable_size(entry['float_bytes_more'])}",
        ]
        for entry in document["advice"]
    ]  # fmt: skip
    how = (
        f"All of it as settings is in <code>{escape(advised)}</code>, for <code>smoothquant-kernels quantize "
        f"--config {escape(advised)}</code>."
        if advised
        else "No setting is better by enough to be advised."
    )
    return (
        "<section>\n<h2>The worst layers, and what would help</h2>\n<p>Every alternative was tried on the measured "
        "tokens, for all layers that read the same input together and one setting at a time; &ldquo;then&rdquo; is "
        f"what was measured with the advised one. Scales per token take a little more time than static ones. "
        f"{how}</p>\n"
        + _table(
            f"The {len(rows)} layers with the lowest SQNR, in dB",
            [("layer", "left"), ("SQNR", ""), ("then", ""), ("advice", "text"), ("tried", "left"),
             ("float<br>costs", "")],
            rows,
            "scroll whole",
        ) + "\n</section>"
    )  # fmt: skip


def _tried(entry: Document) -> str:
    lines = []
    now = entry["tried"][0]["activation_scheme"]
    for i, trial in enumerate(entry["tried"][1:], 1):
        what = "" if trial["alpha"] is None else f"alpha {trial['alpha']:g}"
        if trial["activation_scheme"] != now:
            what = f"{what} {escape(trial['activation_scheme'])}".strip()
        line = f"{what}: {_db(trial['sqnr'])}"
        lines.append(f"<strong>{line}</strong>" if i == entry["chosen"] else line)
    return "<br>".join(lines)


def _footer() -> str:
    own = installed_version(PACKAGE) or "(source tree)"
    return f"Made by {PACKAGE} {escape(own)}. Method: SmoothQuant (Xiao et al., 2022)."
