"""What calibration measures of experts: the input of the first product, and what each expert's second product reads.

The module computes as always. Its inputs are recorded, and the activations between the products computed once more.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from smoothquant_kernels.modeling.hooks import Hooks
from smoothquant_kernels.nn.experts.source import FloatExperts
from smoothquant_kernels.smoothing.padding import Padding
from smoothquant_kernels.smoothing.statistics import ActivationStatistics


def first_name(name: str) -> str:
    """The name under which statistics keep the input of the first product."""
    return f"{name}.gate_up_proj"


def second_name(name: str, expert: int | None = None) -> str:
    """The name under which statistics keep what the second products read: of one expert, or of all together."""
    return f"{name}.down_proj" if expert is None else f"{name}.down_proj.{expert}"


def watched_names(experts: Mapping[str, FloatExperts]) -> tuple[str, ...]:
    """All names under which statistics may keep something of these experts."""
    return tuple(
        each
        for name, module in experts.items()
        for each in (
            first_name(name),
            second_name(name),
            *(second_name(name, e) for e in range(module.count)),
        )
    )


class ExpertRecorder:
    """Merges what the experts read into `statistics`, call by call."""

    def __init__(
        self,
        statistics: ActivationStatistics,
        experts: Mapping[str, FloatExperts],
        padding: Padding,
    ) -> None:
        self._statistics, self._experts, self._padding = statistics, experts, padding

    def watch(self, hooks: Hooks) -> None:
        """Records all calls until the hooks are removed."""
        for name, experts in self._experts.items():
            hooks.on_arguments(experts.module, partial(self._record, name, experts))

    def _record(
        self, name: str, experts: FloatExperts, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        with torch.no_grad():
            routing = experts.inputs(args, kwargs)
            keep = self._padding.keep(name, routing.x)
            self._statistics.update(first_name(name), routing.x, keep, moments=False)
            for e in range(experts.count):
                rows = routing.of(e)
                if keep is not None:
                    rows = rows[keep[rows]]
                if len(rows):
                    self._add(name, e, experts.inner_of(e, routing.x[rows]))

    def _add(self, name: str, e: int, inner: Tensor) -> None:
        self._statistics.update(second_name(name), inner, None, moments=False)
        self._statistics.update_channels(second_name(name, e), inner)
