"""Times every tile of the GPU's GEMM table and says which the dispatch should take.

    python -m benchmarks.tuner --device cuda --json tune.json [--resume] [--budget-seconds 300]
    python -m benchmarks.tuner --report tune.json [--cache FILE]     # no GPU needed
    SQK_TUNE_CACHE=FILE python ...                                   # GEMMs by what was measured

A line: the dispatch's tile and the best tile with their microseconds, and what the dispatch loses. Then new rows for
csrc/gemm/tiles, in C++: rules, rates, and, of a tuning build, the candidates that are worth shipping. A tile whose
result is not the specification's is not timed.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.lib import cases, gpu, runner, timer
from benchmarks.lib.cases import Case, Choice, Expected, Operands, Table
from benchmarks.lib.runner import WrongResult, first_line
from benchmarks.tuner import choices, rules
from benchmarks.tuner.choices import Result, timed
from smoothquant_kernels.backends.tuned_tiles import VARIABLE, tune_cache

#: What must be the same for measurements to be continued, beside the machine: what the table calls a tile.
TILE_FACTS = ("name", "kernel", "m", "n", "k", "stages", "schedule", "swap_ab", "cluster", "most_splits")  # fmt: skip


def measure(
    case: Case,
    table: Table,
    device: torch.device,
    seconds: float,
    sample: gpu.Sampler = dict,
) -> Result:
    """All tiles that serve the case: each checked and roughly timed alone, then the best side by side."""
    generator = cases.generator_of(case, device)
    count = timer.input_sets(case.bytes, device)
    sets = [cases.make_operands(case, generator) for _ in range(count)]
    expected = Expected(case, sets[0], generator)
    cases.poison(case, device)
    if wrong := expected.wrong(cases.dispatched(sets[0])):
        raise WrongResult(f"the dispatch is wrong: {wrong}")

    def variant(choice: Choice | None) -> timer.Recorded:
        def call(a: Operands) -> torch.Tensor:
            return cases.dispatched(a) if choice is None else cases.forced(a, *choice)

        return cases.record_each(call, sets, device)

    def named(choice: Choice) -> dict[str, Any]:
        return dict(zip(("tile", "splits"), choice, strict=True))

    rough: dict[Choice, timer.Timing] = {}
    not_timed: list[dict[str, Any]] = []
    for choice in cases.choices(table, case.m):
        try:
            cases.poison(case, device)
            if wrong := expected.wrong(cases.forced(sets[0], *choice)):
                not_timed.append(named(choice) | {"what": "wrong", "why": wrong})
                continue
            alone = {"": variant(choice)}
            rough[choice] = timer.measure(alone, device=device, seconds=0, least=3, most=3)[""]
        except RuntimeError as error:  # the tile cannot serve the shape
            not_timed.append(named(choice) | {"what": "refused", "why": first_line(error)})
    if not rough:
        raise RuntimeError(f"no tile served the problem: {not_timed[0]['why']}")
    finals = choices.finalists(table, {choice: alone.us for choice, alone in rough.items()})
    ready = {"dispatched": variant(None)} | {str(choice): variant(choice) for choice in finals}
    timings = timer.measure(ready, device=device, seconds=seconds)
    now = timings["dispatched"]
    times = []
    for choice in rough:
        timing = timings.get(str(choice), rough[choice])
        spread = {"p20": timing.p20, "p80": timing.p80} if choice in finals else {}
        times.append(named(choice) | {"us": timing.us, "rough": choice not in finals} | spread)
    taken = named(cases.chosen(case, device) or (-1, 0)) | {"us": now.us}
    result = key_of(case) | {"dispatched": taken, "times": times, "not_timed": not_timed}
    return result | cases.sample_under_load(ready["dispatched"], now.us, sample, device)


def key_of(case: Case) -> Result:
    names = ("model", "layer", "M", "N", "K")
    return dict(zip(names, (case.layer.model, case.layer.name, *case.key), strict=True))


def check_same_tiles(path: Path, table: Table) -> None:
    """SystemExit if the file was measured with other tiles."""
    if not path.exists():
        return

    def facts(of: Table) -> list[list[Any]]:
        return [[tile.get(fact) for fact in TILE_FACTS] for tile in of["tiles"]]

    if facts(json.loads(path.read_text()).get("table", {"tiles": []})) != facts(table):
        sys.exit(f"{path} was measured with other tiles than this library has: start a new file")


def run(args: argparse.Namespace) -> int:
    """Measures what the budget allows; 1 if a tile was wrong or a case failed, or nothing was measured."""
    device = torch.device(args.device)
    machine = runner.machine_facts(device) | {"date": datetime.date.today().isoformat()}
    table = cases.current_table(device)
    if table is None:
        sys.exit(f"the table of the CUDA library cannot be read: {cases.why_no_table()}")
    if tune_cache().in_use:
        sys.exit(f"{VARIABLE} is set, and the dispatch would follow it. Unset it.")
    if args.resume:
        check_same_tiles(args.json, table)
    sample = gpu.sampler(device)
    results = runner.run_cases(
        cases.cases_of(args.layers, args.tokens),
        lambda case: measure(case, table, device, args.seconds, sample),
        key=key_of,
        line=lambda result: rules.loss_line(table, result),
        args=args,
        facts=machine,
        summary=lambda _: {"table": table},
        rows_name="results",
    )
    report({"machine": machine, "table": table, "results": results}, args)
    return int(any(is_bad(result) for result in results) or not results)


def is_bad(result: Result) -> bool:
    return not timed(result) or any(t["what"] == "wrong" for t in result["not_timed"])


def report(data: dict[str, Any], args: argparse.Namespace) -> None:
    """What the results say, printed: losses, what was wrong or refused, then rows of C++; and the cache, if wanted."""
    table, machine = data["table"], data["machine"]
    results = [result for result in data["results"] if timed(result)]
    for name, ratio in rules.loss_means(results).items():
        print(f"geomean {name:9s} | the dispatch loses {rules.percent(ratio)}")
    said = Counter(
        (t["what"], rules.named(table, t), t["why"]) for r in results for t in r["not_timed"]
    )
    for (what, name, why), count in said.most_common(12):
        print(f"{what}: tile {name} in {count} problems: {why}")
    if bad := len(data["results"]) - len(results):
        print(f"{bad} problems failed")
    print("\n".join(cpp(table, machine, results)))
    if args.cache:
        choices.write_cache(args.cache, data, args.with_candidates)


def cpp(table: Table, machine: dict[str, Any], results: Sequence[Result]) -> list[str]:
    """Rules and rates for csrc/gemm/tiles, below a comment that says where they come from."""
    clocks = [result["sm_mhz"] for result in results if result.get("sm_mhz")]
    at = "no clock read"
    if clocks:
        middle = statistics.median(clocks)
        at = f"SM {min(clocks):.0f} .. {max(clocks):.0f} MHz, median {middle:.0f}"
    names = ("driver", "cuda", "torch", "commit")
    facts = [f"{name} {machine[name]}" for name in names if machine.get(name)]
    tokens = ", ".join(str(m) for m in sorted({result["M"] for result in results}))
    return [
        f"// {machine['device']}, {at}, {machine.get('date', 'no date')};",
        f"// {', '.join(facts)}; benchmarks/tuner: {len(results)} problems, M {tokens or '-'}.",
        *rules.cpp_rules(table, machine, results),
        *choices.promotions(table, machine, results),
        *rules.rate_lines(table, results, machine.get("sms")),
    ]


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = runner.parser_of(__doc__)
    runner.add_layer_options(parser)
    parser.add_argument("--report", type=Path, metavar="FILE", help="measure nothing")
    parser.add_argument("--cache", type=Path, metavar="FILE", help=f"write what {VARIABLE} reads")
    parser.add_argument(
        "--with-candidates", action="store_true",
        help="the cache may choose tiles that only a tuning build holds",
    )  # fmt: skip
    args = parser.parse_args(arguments)
    if args.with_candidates and not args.cache:
        parser.error("--with-candidates is for the cache: name it with --cache")
    if not args.report:
        runner.check_options(parser, args)
        runner.fill_in_layers(args)
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
