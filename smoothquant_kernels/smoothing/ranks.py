"""Merging the statistics that the ranks of a process group have collected."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from smoothquant_kernels.errors import SmoothQuantError
from smoothquant_kernels.smoothing import statistics as statistics_module
from smoothquant_kernels.smoothing.rows import Rows
from smoothquant_kernels.smoothing.statistics import (
    ActivationStatistics,
    add_to,
)


def all_reduce(statistics: ActivationStatistics, group: Any) -> None:
    """Runs `ActivationStatistics.all_reduce`."""
    if not (dist.is_available() and dist.is_initialized()):
        raise SmoothQuantError(
            "all_reduce needs torch.distributed: call torch.distributed.init_process_group on every rank first."
        )
    summaries: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(summaries, summary_of(statistics), group)
    check_alike(summaries, "ranks")  # all ranks check the same list, so all agree
    sizes: dict[str, int] = {}
    for summary in summaries:
        sizes |= {n: k for n, k in summary["sizes"].items() if n not in sizes}
    if not sizes:
        statistics.check_not_empty()
    merge = _Merge(statistics, group, summaries)
    zeros = {n: torch.zeros(k) for n, k in sizes.items() if n not in statistics.absmax}
    flat = merge.flat([statistics.absmax.get(n, zeros.get(n)) for n in sizes])
    # Exact in any order. As integers, because gloo's MAX of floats drops NaN: the bits of magnitudes have their order,
    # and NaN comes after infinity.
    dist.all_reduce(flat.view(torch.int32), dist.ReduceOp.MAX, group)
    parts = flat.to(merge.home).split(list(sizes.values()))
    absmax = {n: part.clone() for n, part in zip(sizes, parts, strict=True)}
    tokens = merge.token_maxima(sizes, statistics_module.PEAK_TOKENS)
    sums = merge.sums("counts", statistics.square_sums, torch.float64)
    moments = merge.sums("moments", statistics.moments, torch.float32)
    source = next((r for r, s in enumerate(summaries) if s["sample"]), 0)
    sample = [{k: v.cpu() for k, v in statistics.sample.items()}]
    dist.broadcast_object_list(sample, merge.global_rank(source), group)
    statistics.absmax, statistics.token_absmax, statistics.square_sums = absmax, tokens, sums
    statistics.counts = dict(sum((Counter(s["counts"]) for s in summaries), Counter[str]()))
    statistics.moments = moments
    statistics.rows = merge.rows()
    statistics.tokens = sum(summary["tokens"] for summary in summaries)
    statistics.sample = sample[0]


class _Merge:
    """The exchange of what the ranks hold; each rank takes part in every one, in the same order."""

    def __init__(
        self, statistics: ActivationStatistics, group: Any, summaries: list[dict[str, Any]]
    ) -> None:
        self._statistics, self._group, self._summaries = statistics, group, summaries
        self._rank = dist.get_rank(group)
        self.home = next((t.device for t in statistics.absmax.values()), torch.device("cpu"))
        nccl = dist.get_backend(group) == "nccl"
        self._place = (
            torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")
        )

    def flat(self, parts: list[Any], dtype: torch.dtype = torch.float32) -> Tensor:
        """One vector of all, where the group's backend can send it."""
        empty = torch.empty(0, device=self._place, dtype=dtype)
        return torch.cat([p.to(self._place, dtype) for p in parts] or [empty])

    def global_rank(self, rank: int) -> int:
        return rank if self._group is None else dist.get_global_rank(self._group, rank)

    def _from(
        self, rank: int, mine: Mapping[str, Tensor], sizes: Mapping[str, int], dtype: torch.dtype
    ) -> dict[str, Tensor]:
        """The vectors of one rank, of these sizes, on every rank."""
        total = sum(sizes.values())
        if rank == self._rank:
            sent = self.flat([mine[n].flatten()[:size] for n, size in sizes.items() if size], dtype)
        else:
            sent = torch.empty(total, device=self._place, dtype=dtype)
        if total:
            dist.broadcast(sent, self.global_rank(rank), self._group)
        return dict(zip(sizes, sent.to(self.home).split(list(sizes.values())), strict=True))

    def token_maxima(self, layers: Mapping[str, int], most: int) -> dict[str, Tensor]:
        """The first `most` tokens of each layer, in the order of the ranks."""
        found: dict[str, list[Tensor]] = {n: [] for n in layers}
        left = dict.fromkeys(layers, most)
        for rank, summary in enumerate(self._summaries):
            counts = {n: min(summary["peaks"].get(n, 0), left[n]) for n in layers}
            sent = self._from(rank, self._statistics.token_absmax, counts, torch.float32)
            for name, part in sent.items():
                found[name].append(part)
                left[name] -= len(part)
        return {n: torch.cat(parts) for n, parts in found.items()}

    def sums(self, entry: str, mine: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
        """The sums of all ranks, added in their order, layer by layer: a vector or a square matrix of its channels.

        `entry` of a summary names the layers that a rank has them of.
        """
        found: dict[str, Tensor] = {}
        for rank, summary in enumerate(self._summaries):
            for name in summary[entry]:
                k = summary["sizes"][name]
                shape = (k, k) if entry == "moments" else (k,)
                part = self._from(rank, mine, {name: math.prod(shape)}, dtype)[name].view(shape)
                add_to(found, name, part)
        return found

    def rows(self) -> dict[str, Rows]:
        """Chooses from the rows of all ranks. `absmax` is merged already."""
        statistics = self._statistics
        mine = {n: rows.both() for n, rows in statistics.rows.items()}
        found: dict[str, list[Rows]] = {}
        for rank, summary in enumerate(self._summaries):
            for name, shape in summary["rows"].items():
                k, dtype = statistics.absmax[name].numel(), getattr(torch, shape["dtype"])
                sizes = {name: shape["rows"] * k}
                part = self._from(rank, mine, sizes, torch.float32)[name].view(-1, k)
                received = part.to(dtype)  # exact, because it was of this type
                found.setdefault(name, []).append(Rows.of(received, shape["first"]))
        return {
            n: Rows.merged(parts, statistics.absmax[n], statistics.rotation(n))
            for n, parts in found.items()
        }


def summary_of(statistics: ActivationStatistics) -> dict[str, Any]:
    """What the ranks must agree on, and the sizes of what each one sends."""
    return {
        "watched": sorted(statistics.watched or statistics.absmax),
        "sizes": {n: t.numel() for n, t in statistics.absmax.items()},
        "rows": {n: rows.shape() for n, rows in statistics.rows.items()},
        "counts": dict(statistics.counts),
        "moments": list(statistics.moments),
        "peaks": {n: len(t) for n, t in statistics.token_absmax.items()},
        "tokens": statistics.tokens,
        "sample": bool(statistics.sample),
    }


def check_alike(summaries: list[dict[str, Any]], what: str) -> None:
    """Raises SmoothQuantError unless all that measured anything measured the same layers, of the same sizes."""
    used = [(i, s) for i, s in enumerate(summaries) if s["watched"]]
    sizes: dict[str, int] = {}
    for i, summary in used:
        first, reference = used[0]
        if different := set(summary["watched"]) ^ set(reference["watched"]):
            raise SmoothQuantError(
                f"{what} {first} and {i} measured different layers ({len(different)} differ, first "
                f"{min(different)}): calibrate the same model with the same `skip` everywhere."
            )
        sizes |= summary["sizes"]
    for entry, instead in (
        ("counts", "calibrate with this release"),
        ("moments", "calibrate with the same weight_rounding and formats"),
    ):
        kept = {name for _, summary in used for name in summary[entry]}
        for lacking, summary in used:
            if (kept & summary["sizes"].keys()) <= set(summary[entry]):
                continue
            raise SmoothQuantError(
                f"{what} {lacking} lack {entry}, which others have: {instead} everywhere."
            )
    for i, summary in used:
        wrong = next((n for n, k in summary["sizes"].items() if sizes[n] != k), None)
        if wrong is not None:
            raise SmoothQuantError(
                f"layer {wrong} has {summary['sizes'][wrong]} input channels in {what} {i} and {sizes[wrong]} in "
                "another: calibrate the same model everywhere."
            )
