"""The checks of kernel_checks.py for the ops with an int8 cache of keys and values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.lib import caches, cases
from benchmarks.lib.caches import APPEND, ATTENTION, Case, Heads, Inputs
from benchmarks.on_gpu.kernel_checks import IN_A_GRAPH, REPEATS, NotHere, Row
from smoothquant_kernels import ops, reference

WRITTEN = ("k_cache", "v_cache", "k_scale", "v_scale")
#: What an append leaves alone in a cache.
POISON, POISON_SCALE = -128, -5.0


class CacheRow(Row):
    """`kv_append` or `decode_attention_s8`."""

    def __init__(self, device: torch.device, name: str) -> None:
        super().__init__(device)
        self.name = name

    def cases(self) -> list[Case]:
        """A cache without and one with pages, an odd head; on a GPU also a long one."""
        toys = [(Heads("toy", 4, 2, 32), 2, 130, 64), (Heads("toy", 3, 3, 80), 3, 70, 0)]
        sizes = [*toys, (Heads("toy", 5, 1, 100), 1, 65, 64)]
        if self.large:
            sizes[1] = (caches.HEADS[0], 8, 4096, 0)
        new = 1 if self.name == ATTENTION else 5
        return [Case(self.name, heads, b, new, n, page) for heads, b, n, page in sizes]

    def _inputs(self, case: Case) -> tuple[Inputs, torch.Generator]:
        g = torch.Generator(self.device).manual_seed(case.context)
        inputs = caches.make_inputs(case, g)
        if case.op == APPEND:
            self._poison(inputs)
        return inputs, g

    def _poison(self, inputs: Inputs) -> None:
        for name in WRITTEN:
            inputs[name].fill_(POISON if name.endswith("cache") else POISON_SCALE)

    def _work(self, case: Case, inputs: Inputs, g: torch.Generator) -> Work:
        return (AppendWork if case.op == APPEND else AttentionWork)(case, inputs, g)

    def shapes(self) -> str:
        for case in self.cases():
            work = self._work(case, *self._inputs(case))
            work.launch()
            if wrong := work.wrong():
                return f"{case}: {wrong}"
        return ""

    def graph(self) -> str:
        if self.device.type != "cuda":
            raise NotHere
        case = self.cases()[0]
        work = self._work(case, *self._inputs(case))
        self._captured(work.launch).replay()
        torch.cuda.synchronize()
        return work.wrong()

    def dependent(self) -> str:
        """New keys and values of a GEMM, the writer, then attention: each may start while the one before it ends."""
        if not cases.has_cuda_ops(self.device):
            raise NotHere
        for case in self.cases():
            if wrong := chain(self.device, case):
                return f"{case}: {wrong}"
        return ""

    def repeats(self) -> str:
        if not cases.has_cuda_ops(self.device):
            raise NotHere
        case = self.cases()[1]
        work = self._work(case, *self._inputs(case))
        work.launch()
        if wrong := work.wrong():
            return wrong
        first = [t.clone() for t in work.results()]
        different = torch.zeros((), dtype=torch.int64, device=self.device)

        def once() -> None:
            work.clear()
            work.launch()
            for found, expected in zip(work.results(), first, strict=True):
                different.add_((found != expected).any())

        once()
        if self.device.type == "cuda":
            graph = self._captured(lambda: [once() for _ in range(IN_A_GRAPH)])
            different.zero_()
            for _ in range(REPEATS // IN_A_GRAPH):
                graph.replay()
        bad = int(different)
        return f"{bad} results differ from the first" if bad else ""


class Work:
    """A call that can be repeated, and compared with the specification."""

    def __init__(self, case: Case, inputs: Inputs, g: torch.Generator) -> None:
        self.case, self.inputs, self.g = case, inputs, g

    launch: Callable[[], None]
    clear: Callable[[], None]
    wrong: Callable[[], str]
    results: Callable[[], Sequence[Tensor]]


class AppendWork(Work):
    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.expected = self.inputs | {name: self.inputs[name].clone() for name in WRITTEN}
        reference.kv_append(**self.expected)

    def launch(self) -> None:
        ops.kv_append(**self.inputs)

    def clear(self) -> None:
        for name in WRITTEN:
            self.inputs[name].fill_(POISON if name.endswith("cache") else POISON_SCALE)

    def wrong(self) -> str:
        for name in WRITTEN:
            if off := int((self.inputs[name] != self.expected[name]).sum()):
                return f"{off} elements of {name} differ"
        return ""

    def results(self) -> Sequence[Tensor]:
        return [self.inputs[name] for name in WRITTEN]


class AttentionWork(Work):
    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.y = torch.full_like(self.inputs["q"], torch.nan)
        self.pairs = caches.sampled(self.case, self.g)

    def launch(self) -> None:
        self.y.copy_(ops.decode_attention_s8(**self.inputs))

    def clear(self) -> None:
        self.y.fill_(torch.nan)

    def wrong(self) -> str:
        return caches.wrong_attention(self.case, self.inputs, self.y, self.pairs, caches.ALLOWED)

    def results(self) -> Sequence[Tensor]:
        return [self.y]


def chain(device: torch.device, case: Case) -> str:
    """A GEMM gives k and v of one token; they are written and attended to. Empty, or what is wrong."""
    h = case.heads
    g = torch.Generator(device).manual_seed(case.batch + h.dim)
    one = Case(ATTENTION, h, case.batch, 1, case.context, case.page)
    inputs = caches.make_inputs(one, g)
    layer = cases.Case(cases.Layer("", "kv", 2 * h.kv * h.dim, 96), case.batch)
    operands = cases.make_operands(layer, g)
    cache = {name: inputs[name] for name in (*WRITTEN, "block_table") if name in inputs}
    expected = {name: t.clone() for name, t in cache.items()}
    where = inputs["lengths"] - 1

    def halves(y: Tensor) -> dict[str, Tensor]:
        k, v = y.view(case.batch, 1, 2 * h.kv, h.dim).transpose(1, 2).chunk(2, dim=1)
        return {"k": k, "v": v}

    right = reference.gemm_s8(operands.x_q, operands.w_q, operands.x_scale, operands.w_scale)
    written = {"positions": where, "rotation": case.rotation}
    ops.kv_append(**halves(cases.dispatched(operands)), **cache, **written)
    y = ops.decode_attention_s8(**inputs)
    reference.kv_append(**halves(right), **expected, **written)
    for name in WRITTEN:
        if off := int((cache[name] != expected[name]).sum()):
            return f"{off} elements of {name} differ"
    return caches.wrong_attention(one, inputs, y, caches.sampled(one, g), caches.ALLOWED)
