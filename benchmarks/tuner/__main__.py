"""Times every tile of the GPU's GEMM table and says which the dispatch should take.

    python benchmarks/tune.py --device cuda --json tune.json [--resume] [--budget-seconds 300]
    python benchmarks/tune.py --report tune.json [--cache FILE]     # no GPU needed
    SQK_TUNE_CACHE=FILE python ...                                 # GEMMs by what was measured

Each line: what the dispatch takes and the best tile with their microseconds, and what the dispatch loses. Then new rows
for csrc/gemm/table_*.h, in C++: rules, rates, and, of a tuning build, the candidates that are worth shipping. A tile
whose result is not the specification's is not timed.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import statistics
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gemm_cases
import gpu_state
import gpu_timer
import runner
import torch
import tune_choices
import tune_rules
from bench_gemm import add_common_options, fill_in
from gemm_cases import Case, Choice, Expected, Operands, Table
from report import WrongResult, first_line, usable, write_json
from tune_rules import Result

from smoothquant_kernels.backends.tuned_tiles import VARIABLE, tune_cache

#: What must be the same for measurements to be continued: the GPU and what its table calls a tile.
TILE_FACTS = ("name", "kernel", "m", "n", "k", "stages", "schedule", "swap_ab", "cluster", "most_splits")  # fmt: skip


def measure(
    case: Case,
    table: Table,
    device: torch.device,
    seconds: float,
    sample: gpu_state.Sampler = dict,
) -> Result:
    """All tiles that serve the case: each checked and roughly timed alone, then the best side by side."""
    generator = gemm_cases.generator(case, device)
    count = gpu_timer.input_sets(case.bytes, device)
    sets = [gemm_cases.make_operands(case, generator) for _ in range(count)]
    expected = Expected(case, sets[0], generator)
    gemm_cases.poison(case, device)
    if wrong := expected.wrong(gemm_cases.dispatched(sets[0])):
        raise WrongResult(f"the dispatch is wrong: {wrong}")

    def variant(choice: Choice | None) -> gpu_timer.Recorded:
        def call(a: Operands) -> torch.Tensor:
            return gemm_cases.dispatched(a) if choice is None else gemm_cases.forced(a, *choice)

        return gemm_cases.record_each(call, sets, device)

    rough: dict[Choice, gpu_timer.Timing] = {}
    not_timed: list[dict[str, Any]] = []
    for choice in gemm_cases.choices(table, case.m):
        named = dict(zip(("tile", "splits"), choice, strict=True))
        try:
            gemm_cases.poison(case, device)
            if wrong := expected.wrong(gemm_cases.forced(sets[0], *choice)):
                not_timed.append(named | {"what": "wrong", "why": wrong})
                continue
            alone = {"": variant(choice)}
            rough[choice] = gpu_timer.measure(alone, device=device, seconds=0, least=3, most=3)[""]
        except RuntimeError as error:  # the tile cannot serve the shape
            not_timed.append(named | {"what": "refused", "why": first_line(error)})
    if not rough:
        raise RuntimeError(f"no tile served the problem: {not_timed[0]['why']}")
    finals = tune_choices.finalists(table, {choice: alone.us for choice, alone in rough.items()})
    ready = {"dispatched": variant(None)} | {str(choice): variant(choice) for choice in finals}
    timings = gpu_timer.measure(ready, device=device, seconds=seconds)
    now = timings["dispatched"]
    times = []
    for choice in rough:
        timing = timings.get(str(choice), rough[choice])
        named = dict(zip(("tile", "splits"), choice, strict=True))
        spread = {"p20": timing.p20, "p80": timing.p80} if choice in finals else {}
        times.append(named | {"us": timing.us, "rough": choice not in finals} | spread)
    tile, splits = gemm_cases.chosen(case, device) or (-1, 0)
    result = describe(case) | {
        "dispatched": {"tile": tile, "splits": splits, "us": now.us},
        "times": times,
        "not_timed": not_timed,
    }
    return result | gemm_cases.sample_under_load(ready["dispatched"], now.us, sample, device)


def describe(case: Case) -> Result:
    names = ("model", "layer", "M", "N", "K")
    return dict(zip(names, (case.layer.model, case.layer.name, *case.key), strict=True))


def problem(result: Result) -> tuple[int, int, int]:
    return result["M"], result["N"], result["K"]


def same_tiles(one: Table, other: Table) -> bool:
    facts = [[[tile.get(f) for f in TILE_FACTS] for tile in t["tiles"]] for t in (one, other)]
    return facts[0] == facts[1]


def earlier_results(path: Path, machine: dict[str, Any], table: Table) -> list[Result]:
    """What an interrupted run measured; SystemExit where it measured something else."""
    if not path.exists():
        return []
    data = json.loads(path.read_text())
    if data["machine"]["device"] != machine["device"]:
        sys.exit(f"{path} was measured on {data['machine']['device']}, this is {machine['device']}")
    if not same_tiles(data["table"], table):
        sys.exit(f"{path} was measured with other tiles than this library has: start a new file")
    if data["machine"].get("commit") != machine.get("commit"):
        print(
            f"{path} was measured at commit {data['machine'].get('commit')}: its kernels may differ"
        )
    return list(data["results"])


def run(args: argparse.Namespace) -> int:
    """Measures what the budget allows; 1 where a tile was wrong or a case failed, or nothing was measured."""
    begin = time.monotonic()
    device = torch.device(args.device)
    machine = gpu_state.machine(device) | {
        "command": " ".join(["python", *sys.argv]),
        "date": datetime.date.today().isoformat(),
    }
    print(", ".join(f"{name} {value}" for name, value in machine.items()), flush=True)
    table = gemm_cases.current_table(device)
    if table is None:
        sys.exit("the CUDA library is not loaded (python -m smoothquant_kernels doctor says why)")
    if tune_cache().in_use:
        sys.exit(f"{VARIABLE} is set: what the dispatch takes would be what it says. Unset it.")
    sample = gpu_state.sampler(device)
    results = earlier_results(args.json, machine, table) if args.resume else []
    done = {problem(result) for result in results if result.get("times")}
    failed = {problem(result) for result in results} - done
    todo = [case for case in gemm_cases.cases(args.layers, args.tokens) if case.key not in done]
    todo.sort(key=lambda case: case.key in failed)  # last: they may break the context again
    if done:
        print(f"{len(done)} problems were measured before, {len(todo)} are left")
    for place, case in enumerate(todo):
        if time.monotonic() - begin > args.budget_seconds:
            print(
                f"{len(todo) - place} of {len(todo)} problems were not started: the time is spent"
            )
            break
        try:
            result = measure(case, table, device, args.seconds, sample)
            print(tune_rules.loss_line(table, result), flush=True)
        except Exception as error:  # one broken kernel must not hide the others
            result = describe(case) | {"failed": first_line(error), "times": []}
            print(f"{case} | failed: {result['failed']}", flush=True)
        results = [other for other in results if problem(other) != case.key] + [result]
        if args.json:
            write_json(args.json, {"machine": machine, "table": table, "results": results})
        if not usable(device):
            print("the GPU does not answer any more: no further problem is started")
            if args.json and any(other.key not in failed for other in todo[place + 1 :]):
                sys.exit(runner.CONTEXT_LOST)
            break
    report({"machine": machine, "table": table, "results": results}, args)
    return int(any(is_bad(result) for result in results) or not results)


def is_bad(result: Result) -> bool:
    return not result["times"] or any(t["what"] == "wrong" for t in result["not_timed"])


def report(data: dict[str, Any], args: argparse.Namespace) -> None:
    """What the results say, printed: losses, what was wrong or refused, then rows of C++; and the cache, if wanted."""
    table, machine = data["table"], data["machine"]
    results = [result for result in data["results"] if result["times"]]
    for name, ratio in tune_rules.loss_means(results).items():
        print(f"geomean {name:9s} | the dispatch loses {tune_rules.percent(ratio)}")
    said = Counter(
        (t["what"], tune_rules.named(table, t), t["why"]) for r in results for t in r["not_timed"]
    )
    for (what, name, why), count in said.most_common(12):
        print(f"{what}: tile {name} in {count} problems: {why}")
    if bad := len(data["results"]) - len(results):
        print(f"{bad} problems failed")
    print("\n".join(cpp(table, machine, results)))
    if args.cache:
        tune_choices.write_cache(args.cache, data, args.with_candidates)


def cpp(table: Table, machine: dict[str, Any], results: Sequence[Result]) -> list[str]:
    """Rules and rates for csrc/gemm/table_*.h, below a comment that says where they come from."""
    clocks = [result["sm_mhz"] for result in results if result.get("sm_mhz")]
    at = "no clock read"
    if clocks:
        at = (
            f"SM {min(clocks):.0f} .. {max(clocks):.0f} MHz, median {statistics.median(clocks):.0f}"
        )
    facts = [
        f"{name} {machine[name]}"
        for name in ("driver", "cuda", "torch", "commit")
        if machine.get(name)
    ]
    tokens = sorted({result["M"] for result in results})
    return [
        f"// {machine['device']}, {at}, {machine.get('date', 'no date')};",
        f"// {', '.join(facts)}; benchmarks/tune.py: {len(results)} problems, M {', '.join(map(str, tokens)) or '-'}.",
        *tune_rules.cpp_rules(table, machine, results),
        *tune_choices.promotions(table, machine, results),
        *tune_rules.rate_lines(table, results, machine.get("sms")),
    ]


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    add_common_options(parser)
    parser.add_argument(
        "--budget-seconds", type=float, default=math.inf, help="no case starts later"
    )
    parser.add_argument("--json", type=Path, help="written after every case")
    parser.add_argument("--resume", action="store_true", help="keep what is in --json already")
    parser.add_argument("--report", type=Path, metavar="FILE", help="measure nothing")
    parser.add_argument("--cache", type=Path, metavar="FILE", help=f"write what {VARIABLE} reads")
    parser.add_argument(
        "--with-candidates", action="store_true",
        help="the cache may choose tiles that only a tuning build holds",
    )  # fmt: skip
    args: Any = parser.parse_args(arguments)
    if args.resume and not args.json:
        parser.error("--resume continues a file: name it with --json")
    if args.with_candidates and not args.cache:
        parser.error("--with-candidates is for the cache: name it with --cache")
    if not args.report:
        fill_in(parser, args)
    return args


def main() -> int:
    args = parse()
    if args.report:
        report(json.loads(args.report.read_text()), args)
        return 0
    with torch.inference_mode():
        return run(args)


if __name__ == "__main__":
    sys.exit(main())
