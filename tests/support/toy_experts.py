"""A module of experts in every layout that transformers has, without transformers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class ToyExperts(nn.Module):
    """Experts with the attributes that transformers' decorator sets."""

    def __init__(
        self,
        count: int = 4,
        hidden: int = 16,
        inner: int = 24,
        *,
        gated: bool = True,
        transposed: bool = False,
        concatenated: bool = True,
        bias: bool = False,
        act_fn: Any = F.silu,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        self.num_experts, self.hidden_dim, self.intermediate_dim = count, hidden, inner
        self.has_gate, self.has_bias = gated, bias
        self.is_transposed, self.is_concatenated = transposed, concatenated
        self.has_post_expert_norm = False
        self.act_fn = act_fn
        n = 2 * inner if gated else inner
        self._first = "gate_up_proj" if gated else "up_proj"
        for name, rows, k in ((self._first, n, hidden), ("down_proj", hidden, inner)):
            w = torch.randn(count, rows, k, generator=g) / k**0.5
            w = w.transpose(1, 2).contiguous() if transposed else w
            setattr(self, name, nn.Parameter(w.to(dtype)))
            if bias:
                b = torch.randn(count, rows, generator=g)
                setattr(self, f"{name}_bias", nn.Parameter(b.to(dtype)))

    def _apply_gate(self, y: Tensor) -> Tensor:
        if self.is_concatenated:
            gate, up = y.chunk(2, dim=-1)
        else:
            gate, up = y[..., ::2], y[..., 1::2]
        result: Tensor = self.act_fn(gate) * up
        return result

    def _product(self, name: str, e: int, x: Tensor) -> Tensor:
        w = getattr(self, name)[e]
        b = getattr(self, f"{name}_bias")[e] if self.has_bias else None
        return F.linear(x, w.t() if self.is_transposed else w, b)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        total = torch.zeros_like(hidden_states)
        for e in range(self.num_experts):
            token, choice = torch.where(top_k_index == e)
            y = self._product(self._first, e, hidden_states[token])
            y = self._apply_gate(y) if self.has_gate else self.act_fn(y)
            y = self._product("down_proj", e, y) * top_k_weights[token, choice, None]
            total.index_add_(0, token, y.to(total.dtype))
        return total


class SortedExperts(ToyExperts):
    """Experts that take rows sorted by expert, as Llama 4's do."""

    def __init__(self, **options: Any) -> None:
        super().__init__(transposed=True, **options)
        del self.is_transposed

    def forward(self, hidden_states: Tensor) -> Tensor:  # type: ignore[override]
        x = hidden_states.view(self.num_experts, -1, self.hidden_dim)
        gate, up = torch.bmm(x, self.gate_up_proj).chunk(2, dim=-1)
        return torch.bmm(up * self.act_fn(gate), self.down_proj).view(-1, self.hidden_dim)


def routing(tokens: int, experts: int, choices: int = 2, seed: int = 0) -> tuple[Tensor, Tensor]:
    """The experts and weights of each token, all of its experts different."""
    g = torch.Generator().manual_seed(seed)
    index = [torch.randperm(experts, generator=g)[:choices] for _ in range(tokens)]
    stacked = torch.stack(index) if index else torch.zeros(0, choices, dtype=torch.int64)
    return stacked, torch.rand(tokens, choices, generator=g)
