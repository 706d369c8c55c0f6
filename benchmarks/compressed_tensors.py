"""A W8A8 checkpoint of llm-compressor in transformers: through this package, and through compressed-tensors.

    python -m benchmarks.compressed_tensors FOLDER ... [--python PATH] [--original FOLDER] [--json FILE]

Both load the folder by `AutoModelForCausalLM.from_pretrained`, in two processes of the interpreter PATH, which needs
torch, transformers, compressed-tensors, accelerate, typer and rich. This package comes from this tree:

    pip install torch==2.13.0
    pip install transformers==5.24.0 compressed-tensors==0.20.0 accelerate typer rich

Memory is measured after loading, after the first and after ten forward passes. Then the processes take turns at the
same greedy decoding, and score the same tokens of one half of Python's documentation topics. The difference is paired:
its standard error is that of the mean over tokens. `--original`: the float model, for the same score. One thread.
"""

from __future__ import annotations

import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from contextlib import ExitStack
from importlib import metadata
from importlib.util import find_spec
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.lib import cpu_isa, runner
from tools.build.plan import ROOT

OURS, THEIRS, FLOAT = "smoothquant_kernels", "compressed-tensors", "float"
PACKAGES = ("torch", "transformers", "compressed-tensors")
PROMPT, NEW, ROUNDS, WINDOW = 32, 24, 5, 512


# --- a process with one model -----------------------------------------------------------------------------------------


def bytes_of(model: Any) -> int:
    tensors = {t.data_ptr(): t.nbytes for t in (*model.parameters(), *model.buffers())}
    return sum(tensors.values())


def resident() -> int:
    match = re.search(r"VmRSS:\s*(\d+) kB", Path("/proc/self/status").read_text())
    assert match is not None
    return 1024 * int(match[1])


def memory(model: Any, before: int) -> dict[str, int]:
    return {"tensors": bytes_of(model), "resident": resident() - before}


def scores(model: Any, folder: Path, tokens: int) -> list[float]:
    """The negative log-likelihood of each token."""
    from smoothquant_kernels.evaluation.models import load_tokenizer
    from smoothquant_kernels.evaluation.text import token_windows, topics

    found: list[float] = []
    options: dict[str, Any] = {"window": WINDOW, "max_tokens": tokens}
    for window in token_windows(topics("evaluation"), load_tokenizer(folder), **options):
        ids = window.input_ids
        log_probs = model(ids, use_cache=False).logits[0, :-1].float().log_softmax(-1)
        nll = -log_probs.gather(1, ids[0, 1:, None]).flatten()
        found += nll[-window.scored :].tolist()
    return found


def decode(model: Any, prompt: Tensor) -> tuple[float, float]:
    """Seconds for the prompt and seconds for a token after it."""
    from transformers import DynamicCache

    begin = time.perf_counter()
    cache = DynamicCache(config=model.config)
    # transformers has renamed the argument
    key = "cache" if "cache" in signature(model.forward).parameters else "past_key_values"
    out = model(prompt, use_cache=True, **{key: cache})
    middle = time.perf_counter()
    for _ in range(NEW):
        token = out.logits[:, -1:].argmax(-1)
        out = model(token, use_cache=True, **{key: cache})
    return middle - begin, (time.perf_counter() - middle) / NEW


def serve(name: str, folder: Path, tokens: int) -> None:
    """Loads the model, and answers commands from stdin in lines of JSON."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else writes to stdout

    def answer(value: Any) -> None:
        print(json.dumps(value), file=answers, flush=True)

    torch.set_num_threads(1)
    from transformers import AutoModelForCausalLM

    if name == OURS:
        from smoothquant_kernels import register_transformers

        register_transformers(compressed_tensors=True)
    before = resident()
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    loaded = memory(model, before)
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(model.config.vocab_size, (1, PROMPT), generator=generator)
    with torch.inference_mode():
        model(prompt)
        first = memory(model, before)
        for _ in range(9):
            model(prompt)
        facts = {p: metadata.version(p) for p in PACKAGES if find_spec(p.replace("-", "_"))}
        facts["dtype"] = str(model.dtype).removeprefix("torch.")
        answer({"loaded": loaded, "first": first, "ten": memory(model, before), "facts": facts})
        for line in sys.stdin:
            answer(decode(model, prompt) if line == "decode\n" else scores(model, folder, tokens))


# --- the comparison ---------------------------------------------------------------------------------------------------


class Process:
    def __init__(self, name: str, folder: Path, args: Any) -> None:
        command = [args.python, "-m", "benchmarks.compressed_tensors", str(folder), "--serve", name]
        self.name = name
        self.process = subprocess.Popen(
            [*command, "--tokens", str(args.tokens)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            text=True, env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        )  # fmt: skip

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()

    def read(self) -> Any:
        assert self.process.stdout is not None
        return json.loads(self.process.stdout.readline())

    def ask(self, command: str) -> Any:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{command}\n")
        self.process.stdin.flush()
        return self.read()


def paired(a: list[float], b: list[float]) -> dict[str, float]:
    """The mean difference of two scores of the same tokens, and its standard error."""
    difference = [x - y for x, y in zip(a, b, strict=True)]
    error = statistics.stdev(difference) / len(difference) ** 0.5
    return {"mean": statistics.fmean(difference), "stderr": error}


def compare(folder: Path, args: Any) -> dict[str, Any]:
    sources = {OURS: folder, THEIRS: folder}
    with ExitStack() as stack:
        made = [stack.enter_context(Process(n, path, args)) for n, path in sources.items()]
        row: dict[str, Any] = {"folder": folder.name, **{p.name: p.read() for p in made}}
        timings: dict[str, list[tuple[float, float]]] = {p.name: [] for p in made}
        for _ in range(ROUNDS):  # turn by turn, because the machine may be shared
            for p in made:
                timings[p.name].append(tuple(p.ask("decode")))
        found = {p.name: p.ask("score") for p in made}
    if args.original is not None:
        with Process(FLOAT, args.original, args) as float_model:
            float_model.read()
            found[FLOAT] = float_model.ask("score")
    for name, pairs in timings.items():
        prefill, token = (statistics.median(column) for column in zip(*pairs, strict=True))
        row[name] |= {"prefill_tokens_s": PROMPT / prefill, "decode_tokens_s": 1 / token}
        row[name]["perplexity"] = float(torch.tensor(found[name]).double().mean().exp())
    row["more_nats"] = paired(found[OURS], found[THEIRS])
    for name in (OURS, THEIRS) if FLOAT in found else ():
        row[name]["more_nats_than_float"] = paired(found[name], found[FLOAT])
    ours, theirs = row[OURS], row[THEIRS]
    row["decode_ratio"] = statistics.median(
        t[1] / o[1] for o, t in zip(timings[OURS], timings[THEIRS], strict=True)
    )
    row["prefill_ratio"] = statistics.median(
        t[0] / o[0] for o, t in zip(timings[OURS], timings[THEIRS], strict=True)
    )
    row["memory_ratio"] = {
        key: {when: ours[when][key] / theirs[when][key] for when in ("loaded", "first", "ten")}
        for key in ("tensors", "resident")
    }
    return row


def table(row: dict[str, Any]) -> str:
    mb = 1e6
    lines = [f"{row['folder']} ({row[OURS]['facts']['dtype']})"]
    for name in (OURS, THEIRS):
        found = row[name]
        sizes = ", ".join(
            f"{found[when]['tensors'] / mb:.0f} ({found[when]['resident'] / mb:.0f})"
            for when in ("loaded", "first", "ten")
        )
        lines.append(
            f"  {name:20s} decode {found['decode_tokens_s']:6.1f} tokens/s | "
            f"prefill {found['prefill_tokens_s']:6.1f} | "
            f"perplexity {found['perplexity']:.3f} | MB of tensors (resident) loaded, first, ten: {sizes}"
        )
        if "more_nats_than_float" in found:
            more = found["more_nats_than_float"]
            lines[-1] += f" | nats over float {more['mean']:+.4f} ± {more['stderr']:.4f}"
    more, ratio = row["more_nats"], row["memory_ratio"]
    lines.append(
        f"  decode {row['decode_ratio']:.2f}x, prefill {row['prefill_ratio']:.2f}x, memory after the first forward "
        f"{ratio['tensors']['first']:.2f}x (resident {ratio['resident']['first']:.2f}x), nats ours - theirs "
        f"{more['mean']:+.4f} ± {more['stderr']:.4f}"
    )
    return "\n".join(lines)


def main() -> int:
    parser = runner.parser_of(__doc__, device=None)
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER")
    parser.add_argument("--python", default=sys.executable, metavar="PATH")
    parser.add_argument("--original", type=Path, help="folder with the float model")
    parser.add_argument("--tokens", type=int, default=3072)
    parser.add_argument(
        "--serve", choices=(OURS, THEIRS, FLOAT), help="this process holds one model"
    )
    args = parser.parse_args()
    if args.serve:
        serve(args.serve, args.folders[0], args.tokens)
        return 0
    facts = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "cpu": cpu_isa.facts(),
        "tokens": args.tokens,
        "command": "python -m benchmarks.compressed_tensors FOLDER ... --python PATH",
    }
    rows = []
    for folder in args.folders:
        rows.append(compare(folder, args))
        print(table(rows[-1]), flush=True)
        runner.write_json(args.json, {"facts": facts, "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
