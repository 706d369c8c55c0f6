"""Int8 caches of keys and values as cases of a benchmark: inputs, both ops, the specification, float16 baselines."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.lib.shapes import by_place
from smoothquant_kernels import ops, reference

ATTENTION, APPEND = "decode_attention_s8", "kv_append"
DTYPE = torch.float16
#: Tokens of a block of a paged cache.
PAGE = 64
#: (sequence, kv head) pairs whose attention is compared with the specification, which takes float64.
SAMPLED = 3
#: Of the largest |v|: weights and values are rounded to float16 (2^-11 each), and so is the result.
ALLOWED = 4 * 2.0**-11
#: What a float16 baseline may be off: its keys are rounded too.
BASELINE_ALLOWED = 0.03


@dataclass(frozen=True)
class Heads:
    """Query heads, kv heads and channels of a head, of a model or of several."""

    model: str
    query: int
    kv: int
    dim: int


HEADS = (
    Heads("Llama 3 8B, Mistral 7B", 32, 8, 128),
    Heads("Llama 3 70B", 64, 8, 128),
    Heads("Qwen2.5-7B", 28, 4, 128),
    Heads("LLaMA-7B", 32, 32, 128),
)
CONTEXTS, BATCHES = (8192, 32768, 1024), (8, 64, 1)
#: (sequences, new tokens of each): decoding in batches and alone, then prompts.
NEW = ((64, 1), (1, 2048), (8, 1), (1, 32768), (1, 1), (1, 8192))
#: A rehearsal on a CPU, and in the simulator.
TOY_HEADS = (Heads("toy", 4, 2, 32), Heads("toy wide", 3, 3, 80))
TOY_CONTEXTS, TOY_BATCHES, TOY_NEW = (130, 7), (2, 1), ((2, 1), (1, 9))


@dataclass(frozen=True)
class Case:
    """One line: an op, `tokens` new tokens of each of `batch` sequences, `context` tokens with them."""

    op: str
    heads: Heads
    batch: int
    tokens: int
    context: int
    page: int = 0  # tokens of a block; 0: a sequence is one block

    @property
    def rotation(self) -> int:
        """As the cache of this package chooses it: the largest power of two that divides the channels."""
        return self.heads.dim & -self.heads.dim

    @property
    def kept(self) -> int:
        """Bytes of the int8 cache that hold the context, scales included."""
        width = reference.padded_k(self.heads.dim, reference.HEAD_MULTIPLE)
        return 2 * self.batch * self.heads.kv * self.context * (width + 4)

    @property
    def bytes(self) -> int:
        """The least that any implementation moves: everything read once, and written once."""
        h = self.heads
        if self.op == ATTENTION:
            return self.kept + 2 * DTYPE.itemsize * self.batch * h.query * self.tokens * h.dim
        read = 2 * DTYPE.itemsize * self.batch * h.kv * self.tokens * h.dim
        tables = 2 * DTYPE.itemsize * self.tokens * h.dim
        return read + tables + self.kept // self.context * self.tokens

    @property
    def memory(self) -> int:
        """Of one set of inputs, those of the float16 baselines included."""
        return 4 * self.kept

    def __str__(self) -> str:
        paged = f" pages of {self.page}" if self.page else ""
        size = f"B {self.batch} T {self.tokens} context {self.context}"
        return f"{self.op} {self.heads.model} {size}{paged}"


def cases_of(
    ops_wanted: Sequence[str], heads: Sequence[Heads], contexts: Sequence[int], batches: Sequence[int],
    new: Sequence[tuple[int, int]],
) -> list[Case]:  # fmt: skip
    """The most telling first; the ops take turns."""
    pages = (0, PAGE)
    attention = [
        Case(ATTENTION, heads[i], batches[j], 1, contexts[k], pages[m])
        for i, j, k, m in by_place(heads, batches, contexts, pages)
    ]
    append = [
        Case(APPEND, heads[i], *new[j], max(1024, new[j][1]), pages[m])
        for i, j, m in by_place(heads, new, pages)
    ]
    found = {ATTENTION: attention, APPEND: append}
    turns = [(place, case) for op in ops_wanted for place, case in enumerate(found[op])]
    return [case for _, case in sorted(turns, key=lambda item: item[0])]


Inputs = dict[str, Any]


def make_inputs(case: Case, g: torch.Generator) -> Inputs:
    """The arguments of the op. Attention finds a full cache, of random keys and values."""
    h, device = case.heads, g.device
    width = reference.padded_k(h.dim, reference.HEAD_MULTIPLE)
    size = case.page or case.context
    per_sequence = -(-case.context // size)
    blocks = case.batch * per_sequence
    made: Inputs = {"rotation": case.rotation}
    for name in ("k", "v"):
        shape = (blocks, h.kv, size, width)
        cache = torch.randint(-127, 128, shape, dtype=torch.int8, generator=g, device=device)
        cache[..., h.dim :] = 0
        scale = torch.rand(shape[:3], generator=g, device=device)
        made |= {f"{name}_cache": cache, f"{name}_scale": scale.mul_(0.02).add_(0.01)}
    if case.page:
        order = torch.randperm(blocks, generator=g, device=device).to(torch.int32)
        made["block_table"] = order.view(case.batch, per_sequence)

    def floats(heads: int) -> Tensor:  # as a projection writes them
        shape = (case.batch, case.tokens, heads, h.dim)
        return torch.randn(shape, dtype=DTYPE, generator=g, device=device).transpose(1, 2)

    def numbers(value: int) -> Tensor:
        return torch.full((case.batch,), value, dtype=torch.int32, device=device)

    if case.op == ATTENTION:
        return made | {"q": floats(h.query), "scale": h.dim**-0.5, "lengths": numbers(case.context)}
    angle = torch.rand(1, case.tokens, h.dim, generator=g, device=device) * 6.28
    made |= {"cos": angle.cos().to(DTYPE), "sin": angle.sin().to(DTYPE)}
    where = numbers(case.context - case.tokens)
    return made | {"k": floats(h.kv), "v": floats(h.kv), "positions": where}


def run_op(case: Case, inputs: Inputs) -> Any:
    return getattr(ops, case.op)(**inputs)


# --- what is right ----------------------------------------------------------------------------------------------------


def wrong_append(inputs: Inputs) -> str:
    """Runs the op, and compares every byte of the cache with the specification's; empty, or what is wrong."""
    names = ("k_cache", "v_cache", "k_scale", "v_scale")
    expected = inputs | {name: inputs[name].clone() for name in names}
    ops.kv_append(**inputs)
    reference.kv_append(**expected)
    for name in names:
        if wrong := int((inputs[name] != expected[name]).sum()):
            return f"{wrong} of {inputs[name].numel()} elements of {name} differ"
    return ""


def sampled(case: Case, g: torch.Generator) -> list[tuple[int, int]]:
    """(sequence, kv head) pairs that are compared; the last of both is one of them."""
    last = (case.batch - 1, case.heads.kv - 1)
    draw = [torch.randint(0, n + 1, (SAMPLED - 1,), generator=g, device=g.device) for n in last]
    return [*zip(*(t.tolist() for t in draw), strict=True), last]


def expected_attention(case: Case, inputs: Inputs, b: int, head: int) -> tuple[Tensor, float]:
    """The specification's y [group, T, D] of a sequence's kv head, and the largest |v| there."""
    group = case.heads.query // case.heads.kv
    table = inputs.get("block_table")
    rows = slice(b, b + 1) if table is None else table[b].long()
    one = {
        n: inputs[n][rows, head : head + 1] for n in ("k_cache", "v_cache", "k_scale", "v_scale")
    }
    q = inputs["q"][b : b + 1, head * group : (head + 1) * group]
    more: Inputs = {"lengths": inputs["lengths"][b : b + 1], "rotation": inputs["rotation"]}
    if table is not None:
        more["block_table"] = torch.arange(len(rows), device=q.device, dtype=torch.int32)[None]
    y = reference.decode_attention_s8(q, scale=inputs["scale"], **one, **more)
    v = plain(one["v_cache"], one["v_scale"], case)
    return y[0], float(v.abs().amax())


def wrong_attention(
    case: Case, inputs: Inputs, y: Tensor, pairs: Sequence[tuple[int, int]], allowed: float
) -> str:
    """Empty, or what is wrong with y [B, Hq, T, D]."""
    group = case.heads.query // case.heads.kv
    for b, head in pairs:
        right, largest = expected_attention(case, inputs, b, head)
        off = (y[b, head * group : (head + 1) * group].double() - right.double()).abs().amax()
        if not bool(off <= allowed * largest):  # NaN is not
            return f"sequence {b}, kv head {head}: off by {float(off):.2e}, allowed {allowed * largest:.2e}"
    return ""


def plain(cache: Tensor, scale: Tensor, case: Case) -> Tensor:
    """What a cache holds, in float32, no longer rotated."""
    x = cache[..., : case.heads.dim].float() * scale[..., None]
    return reference.rotate(x, case.rotation) / max(case.rotation, 1)


# --- float16 ----------------------------------------------------------------------------------------------------------


def float_cache(case: Case, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """The same keys and values as float16 [B, H, context, D], never paged."""
    found = []
    for name in ("k", "v"):
        cache, scale = inputs[f"{name}_cache"], inputs[f"{name}_scale"]
        shape = (case.batch, case.heads.kv, case.context, case.heads.dim)
        made = torch.empty(shape, dtype=DTYPE, device=cache.device)
        for b in range(
            case.batch
        ):  # one at a time: float32 takes eight times the memory of the cache
            rows = inputs["block_table"][b].long() if case.page else slice(b, b + 1)
            x = plain(cache[rows], scale[rows], case)
            made[b] = x.transpose(0, 1).flatten(1, 2)[:, : case.context]
        found.append(made)
    return found[0], found[1]


def attention_baselines(case: Case) -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    """Name -> attention of q to float16 keys and values. `folded` lets the query heads of a kv head be its tokens."""
    scale, group = case.heads.dim**-0.5, case.heads.query // case.heads.kv

    def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=group > 1)

    def by(backend: SDPBackend) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(backend):
                return sdpa(q, k, v)

        return run

    def folded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows = q.reshape(case.batch, case.heads.kv, group, case.heads.dim)
        y = F.scaled_dot_product_attention(rows, k, v, scale=scale)
        return y.reshape(q.shape)

    found = {"sdpa": sdpa, "flash": by(SDPBackend.FLASH_ATTENTION)}
    return found | {"cudnn": by(SDPBackend.CUDNN_ATTENTION), "folded": folded}


def float_append(inputs: Inputs, k_cache: Tensor, v_cache: Tensor, where: Tensor) -> Tensor:
    """What transformers does with new keys and values in float16: the rotary embedding, then two copies by index."""
    k, cos, sin = inputs["k"], inputs["cos"][:, None], inputs["sin"][:, None]
    low, high = k.chunk(2, dim=-1)
    k = k * cos + torch.cat([-high, low], -1) * sin
    k_cache.index_copy_(2, where, k)
    return v_cache.index_copy_(2, where, inputs["v"])
