"""What an int8 cache of keys and values costs a real model, and how much memory it takes.

    python -m benchmarks.kv_cache [--tokens 3072] [--json FILE] [--parts schemes prefill decode greedy memory]

SmolLM2-135M-Instruct in float32, calibrated on one half of Python's documentation topics and evaluated on the other.

* schemes: every scheme with and without smoothing and rotation, by an attention in float that has the errors of the
  cache. All queries of a window read the cache, their own tokens included.
* prefill: the errors of int8 queries and of int8 weights of the values (P), for which no kernel was built.
* decode: the real `Int8KVCache` against the float cache, both token by token, or up to 8 tokens at a time (--step),
  which read the cache in the same way, but for the first 8 of a window.
* greedy: how many of 64 prompts have the same next 32 tokens with the cache as without.
* memory: the bytes that a cache of 4,096 tokens holds, and whether they grow over 100 generations.

Perplexity changes are paired, with one standard error. A results file keeps the parts that this run leaves out.
"""

from __future__ import annotations

import copy
import gc
import json
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.accuracy import with_change
from benchmarks.lib import runner, smollm2
from benchmarks.lib.fake_kv import Errors, FakeAttention
from smoothquant_kernels import Int8KVCache, calibrate_kv_cache, use_int8_attention
from smoothquant_kernels.evaluation.kv_cache import CacheReference, cache_bytes, evaluate_cache
from smoothquant_kernels.evaluation.perplexity import Reference, evaluate
from smoothquant_kernels.evaluation.text import token_windows, topics
from smoothquant_kernels.kv_cache.recording import KVRecorder
from smoothquant_kernels.modeling.run import evaluating
from smoothquant_kernels.reference import rotate

PARTS = ("schemes", "prefill", "decode", "greedy", "memory")
ALPHA = 0.5
DEFAULT, STATIC = "int8 per token and head", "int8 static"
SMOOTHED = f"{DEFAULT}, smoothed by {ALPHA}"
PROMPTS, BATCH, PROMPT_TOKENS, NEW_TOKENS = 64, 16, 48, 32
MEMORY_TOKENS, GENERATIONS = 4096, 100


class RotatedRecorder(KVRecorder):
    """Records the maxima of rotated queries, keys and values."""

    def _record(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> None:
        q, k, v = (rotate(t.float(), t.shape[-1]) for t in (query, key, value))
        super()._record(layer, q, k, v)


class Bench:
    def __init__(
        self, tokens: int, calibration: int, path: Path | None = None, step: int = 1
    ) -> None:
        self.step = step
        self.model, self.tokenizer = smollm2.load(path=path)
        use_int8_attention(self.model)
        self.tokens, self.text = tokens, topics("evaluation")
        self.data = smollm2.calibration(self.tokenizer, calibration)
        self.plain = calibrate_kv_cache(
            self.model, self.data, max_tokens=calibration, progress=False
        )
        self.dim = self.plain.layers[0].k.shape[1]

    @cached_property
    def attention(self) -> FakeAttention:
        recorder = RotatedRecorder(self.model)
        with evaluating(self.model), recorder.watching():
            for ids in self.data:
                self.model(input_ids=ids, use_cache=False)
        return FakeAttention(self.plain, recorder.calibration(self.plain.tokens))

    @cached_property
    def stepwise(self) -> CacheReference:
        """The answers of the float cache."""
        return CacheReference(self.model, step=self.step, max_bytes=4 << 30)

    @cached_property
    def whole(self) -> Reference:
        """The answers of a copy, whose attention stays in float."""
        return Reference(copy.deepcopy(self.model), max_bytes=4 << 30)

    # --- whole windows ---

    def faked(self, name: str, errors: Errors) -> dict[str, Any]:
        """A row about the model with these errors in its attention."""
        with self.attention.of(self.model, errors) as model:
            found = evaluate(
                model, self.text, self.tokenizer, reference=self.whole, max_tokens=self.tokens
            )
        facts = {"alpha": errors.alpha, "rotation": errors.rotation, "query": errors.query}
        return {"cache": name, **facts, "steps": errors.steps, **_row(f"{name} {facts}", found)}

    def schemes(self) -> Iterator[dict[str, Any]]:
        yield self.faked("float16", Errors("float16"))
        for query in (False, True):
            for alpha, rotation in ((None, 0), (ALPHA, 0), (None, self.dim), (ALPHA, self.dim)):
                yield self.faked(DEFAULT, Errors("per_token", alpha, rotation, query))
            for rotation in (0, self.dim):
                yield self.faked(STATIC, Errors("static", None, rotation, query))

    def prefill(self) -> Iterator[dict[str, Any]]:
        yield self.faked("float", Errors(query=True))
        yield self.faked("float", Errors(query=True, rotation=self.dim))
        for steps in (255, 127):
            yield self.faked("float", Errors(steps=steps))
            full = Errors("per_token", None, self.dim, True, steps)
            yield self.faked(DEFAULT, full)
            yield self.faked(STATIC, Errors("static", None, 0, True, steps))

    # --- the real cache ---

    def caches(self) -> dict[str, Callable[[], Any]]:
        def make(**options: Any) -> Callable[[], Any]:
            return lambda: Int8KVCache(self.model, **options)

        return {
            DEFAULT: make(),
            SMOOTHED: make(alpha=ALPHA, calibration=self.plain),
            f"{DEFAULT}, not rotated": make(rotation=0),
            f"{DEFAULT}, smoothed by {ALPHA}, not rotated": make(
                rotation=0, alpha=ALPHA, calibration=self.plain
            ),
            STATIC: make(scheme="static", calibration=self.plain),
        }

    def main_caches(self) -> dict[str, Callable[[], Any]]:
        """The default, the most accurate, and the smallest."""
        found = self.caches()
        return {name: found[name] for name in (DEFAULT, SMOOTHED, STATIC)}

    def stepped(self, name: str, make: Callable[[], Any]) -> dict[str, Any]:
        found = evaluate_cache(
            self.model,
            self.text,
            self.tokenizer,
            make,
            reference=self.stepwise,
            step=self.step,
            max_tokens=self.tokens,
        )
        return {"cache": name, "step": self.step, **_row(name, found)}

    def decode(self) -> Iterator[dict[str, Any]]:
        for name, make in self.caches().items():
            yield self.stepped(name, make)

    def greedy(self) -> Iterator[dict[str, Any]]:
        windows = token_windows(self.text, self.tokenizer, window=PROMPT_TOKENS + 1)
        step = len(windows) // PROMPTS
        rows = [w.input_ids[:, :PROMPT_TOKENS] for w in windows[:: max(1, step)]][:PROMPTS]
        prompts = torch.cat(rows).split(BATCH)  # of one length, so nothing is padded
        want = torch.cat([self.continued(ids, None) for ids in prompts])
        for name, make in self.main_caches().items():
            got = torch.cat([self.continued(ids, make()) for ids in prompts])
            same = got == want
            first = same.int().cumprod(1).sum(1)
            row = {
                "cache": name,
                "prompts": len(want),
                "new_tokens": NEW_TOKENS,
                "all_agree": same.all(1).double().mean().item(),
                "tokens_agree": same.double().mean().item(),
                "agree_until": first.double().mean().item(),
            }
            print(name, json.dumps(row), flush=True)
            yield row

    def continued(self, ids: Tensor, cache: Any) -> Tensor:
        """The next tokens, [B, NEW_TOKENS], past an end of text as well."""
        options = {} if cache is None else {"cache": cache}
        out = self.model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, eos_token_id=None, pad_token_id=0,
            min_new_tokens=NEW_TOKENS, max_new_tokens=NEW_TOKENS, **options,
        )  # fmt: skip
        return out[:, ids.shape[1] :]

    def memory(self) -> Iterator[dict[str, Any]]:
        from transformers import DynamicCache

        ids = token_windows(self.text, self.tokenizer, window=MEMORY_TOKENS)[0].input_ids
        for name, make in {"float32 (DynamicCache)": DynamicCache, **self.main_caches()}.items():
            cache = make()
            with torch.no_grad():
                for part in ids.split(512, 1):
                    self.model(input_ids=part, cache=cache, use_cache=True, logits_to_keep=1)
            repeats = GENERATIONS if name == DEFAULT else 0
            sizes = [self.after_generation(make) for _ in range(repeats)]
            layers, heads = len(self.plain.layers), self.plain.layers[0].k.shape[0]
            float16 = layers * 2 * heads * self.dim * 2 * ids.shape[1]
            row = {
                "cache": name,
                "tokens": ids.shape[1],
                "bytes": cache_bytes(cache),
                "float16_bytes": float16,
                "share": cache_bytes(cache) / float16,
                "generations": len(sizes),
                "first_and_last": sizes[:1] + sizes[-1:],
            }
            print(name, json.dumps(row), flush=True)
            yield row

    def after_generation(self, make: Callable[[], Any]) -> int:
        """The bytes of all float and int8 tensors in the process after a generation, without its cache."""
        ids = torch.arange(16)[None]
        cache = make()
        self.model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, eos_token_id=None, pad_token_id=0,
            min_new_tokens=2, max_new_tokens=2, cache=cache,
        )  # fmt: skip
        del cache
        gc.collect()
        return sum(t.nbytes for t in gc.get_objects() if type(t) is Tensor)


def _row(name: str, found: Any) -> dict[str, Any]:
    row = with_change(found.to_dict())
    print(
        f"{name:52s} perplexity {row['perplexity']:8.3f} | {row['change_percent']:+7.3f} ± "
        f"{row['change_stderr']:.3f} % | KL {row['mean_kl']:.6f} ± "
        f"{row['kl_stderr']:.6f} | top-1 {row['top1_agreement']:.4f}",
        flush=True,
    )
    return row


def main() -> None:
    parser = runner.parser_of(__doc__, device=None)
    parser.add_argument("--tokens", type=int, default=3072)
    parser.add_argument("--calibration", type=int, default=4096)
    parser.add_argument("--parts", nargs="*", default=PARTS, choices=PARTS)
    parser.add_argument("--model", type=Path, help="a folder in which the model was saved")
    parser.add_argument("--step", type=int, default=1, help="of decode: tokens at a time, up to 8")
    args = parser.parse_args()
    bench = Bench(args.tokens, args.calibration, args.model, args.step)
    old = json.loads(args.json.read_text()) if args.json and args.json.exists() else {}
    results = old | {"facts": smollm2.facts(args.tokens, args.calibration)}
    for part in args.parts:
        rows: list[dict[str, Any]] = []
        for row in getattr(bench, part)():
            rows.append(row)
            runner.write_json(args.json, results | {part: rows})
        results[part] = rows


if __name__ == "__main__":
    main()
