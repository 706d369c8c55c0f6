"""Float experts as transformers 5 keeps them: matrices of all experts in one 3-D parameter, in several layouts."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from smoothquant_kernels.nn.experts.gates import Gate, find_gate
from smoothquant_kernels.ops.checks import FLOATS
from smoothquant_kernels.reference import MAX_EXPERTS, MAX_K, sort_by_expert

#: The attribute with the `ExpertFactors` that smoothing leaves on float experts.
FACTORS = "_smoothquant_experts"


@dataclass(frozen=True)
class FloatExperts:
    """A module of float experts, in one layout whatever its own is.

    Attributes:
        module: unchanged.
        gate: the activation between the two products.
        transposed: whether its matrices are [K, N] and not [N, K].
        interleaved: whether gate and up take turns by one channel.
        routed: whether forward takes (hidden_states, top_k_index, top_k_weights). Otherwise it takes rows that are
            sorted already, as many for each expert (Llama 4).
    """

    module: nn.Module
    gate: Gate
    transposed: bool
    interleaved: bool
    routed: bool

    @property
    def first_name(self) -> str:
        """The parameter with the weights of the first product."""
        return "gate_up_proj" if self.gate.is_gated else "up_proj"

    @property
    def first(self) -> nn.Parameter:
        """The weights of all experts' first product, as the module keeps them."""
        return cast(nn.Parameter, getattr(self.module, self.first_name))

    @property
    def count(self) -> int:
        """How many experts there are."""
        return len(self.first)

    @property
    def hidden(self) -> int:
        """The channels of the input and of the output."""
        return self.first.shape[1 if self.transposed else 2]

    @property
    def up_rows(self) -> int:
        """The output channels of the first product."""
        return self.first.shape[2 if self.transposed else 1]

    @property
    def inner(self) -> int:
        """The channels between the two products."""
        return self.up_rows // 2 if self.gate.is_gated else self.up_rows

    @property
    def has_bias(self) -> bool:
        """Whether both products add a bias."""
        return getattr(self.module, f"{self.first_name}_bias", None) is not None

    def up(self, e: int) -> Tensor:
        """[N, hidden] of expert e, the rows of gate before those of up."""
        w = self.first[e].detach()
        return self._in_order(w.t() if self.transposed else w)

    def up_bias(self, e: int) -> Tensor | None:
        """[N] of expert e, in the order of `up`."""
        return self._in_order(self._bias(self.first_name, e)) if self.has_bias else None

    def down(self, e: int) -> Tensor:
        """[hidden, inner] of expert e."""
        w = cast(Tensor, self.module.down_proj)[e].detach()
        return w.t() if self.transposed else w

    def down_bias(self, e: int) -> Tensor | None:
        """[hidden] of expert e."""
        return self._bias("down_proj", e) if self.has_bias else None

    def _bias(self, name: str, e: int) -> Tensor:
        return cast(Tensor, getattr(self.module, f"{name}_bias"))[e].detach()

    def _in_order(self, rows: Tensor) -> Tensor:
        if not self.interleaved:
            return rows
        return torch.cat([rows[0::2], rows[1::2]])

    def inputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Routing:
        """The rows of each expert in a call of the module with these arguments."""
        names = list(inspect.signature(self.module.forward).parameters)
        given = dict(zip(names, args, strict=False)) | kwargs
        x = given[names[0]].reshape(-1, self.hidden)
        if not self.routed:
            return Routing.of_sorted(x, self.count)
        return Routing.of_choices(x, given[names[1]], self.count)

    def inner_of(self, e: int, x: Tensor) -> Tensor:
        """[rows, inner]: what expert e's second product reads for these rows of the input."""
        return self.gate(F.linear(x, self.up(e), self.up_bias(e)))

    def finite_problem(self) -> str | None:
        """The name of a parameter with NaN or Inf values; None if there is none."""
        named = self.module.named_parameters(recurse=False)
        return next((n for n, p in named if not bool(p.detach().isfinite().all())), None)


@dataclass(frozen=True)
class Routing:
    """Which rows of x each expert takes.

    Attributes:
        x: [T, hidden].
        rows: [S] int32, the rows of x by expert.
        bounds: expert e takes `rows[bounds[e]:bounds[e + 1]]`.
    """

    x: Tensor
    rows: Tensor
    bounds: list[int]

    @classmethod
    def of_sorted(cls, x: Tensor, experts: int) -> Routing:
        """For rows that are sorted already, as many for each expert."""
        each = len(x) // experts
        rows = torch.arange(len(x), device=x.device)
        return cls(
            x, rows, list(range(0, experts * each + 1, each)) if each else [0] * (experts + 1)
        )

    @classmethod
    def of_choices(cls, x: Tensor, top_k_index: Tensor, experts: int) -> Routing:
        """For the choices [T, k] of each token."""
        index = choices_of(top_k_index)
        order, _, offsets = sort_by_expert(index, experts)
        return cls(x, order.long() // index.shape[1], offsets.tolist())

    def of(self, e: int) -> Tensor:
        """The rows of x that expert e takes."""
        return self.rows[self.bounds[e] : self.bounds[e + 1]]


def choices_of(t: Tensor) -> Tensor:
    """[T, choices] of a tensor with any leading dimensions."""
    return t.reshape(-1, t.shape[-1])


def read_experts(module: nn.Module) -> FloatExperts | None:
    """What a module of experts computes; None for any other module, and for experts in a form that is not known.

    The layout comes from what transformers says of the module, and a run on a few random tokens proves it, unless the
    module is on the meta device.
    """
    own = {n: p for n, p in module.named_parameters(recurse=False) if p.dim() == 3}
    gated = "gate_up_proj" in own
    first, down = own.get("gate_up_proj" if gated else "up_proj"), own.get("down_proj")
    if (
        first is None
        or down is None
        or len(own) != 2
        or getattr(module, "has_post_expert_norm", False)
    ):
        return None
    if any(True for _ in module.buffers(recurse=False)) or first.dtype not in FLOATS:
        return None
    parameters = list(inspect.signature(module.forward).parameters)
    routed = len(parameters) == 3 and hasattr(module, "is_transposed")
    if not routed and parameters != ["hidden_states"]:
        return None
    transposed = bool(getattr(module, "is_transposed", not routed))
    n, k = (first.shape[2], first.shape[1]) if transposed else (first.shape[1], first.shape[2])
    inner = n // 2 if gated else n
    shape = (len(first), inner, k) if transposed else (len(first), k, inner)
    if tuple(down.shape) != shape or n % (2 if gated else 1) or not 1 <= len(first) <= MAX_EXPERTS:
        return None
    if max(k, inner) > MAX_K or min(k, inner) < 1 or down.dtype != first.dtype:
        return None
    interleaved = gated and not bool(getattr(module, "is_concatenated", True))
    gate = find_gate(
        _own_gate(module, gated=gated, interleaved=interleaved),
        gated=gated,
        alpha=getattr(module, "alpha", None),
        limit=getattr(module, "limit", None),
    )
    if gate is None:
        return None
    found = FloatExperts(module, gate, transposed, interleaved, routed)
    return found if first.is_meta or _is_right(found) else None


def _own_gate(module: nn.Module, *, gated: bool, interleaved: bool) -> Callable[[Tensor], Tensor]:
    """The module's activation, as a function of gate before up."""
    any_module: Any = module

    def apply(y: Tensor) -> Tensor:
        if not gated:
            return cast(Tensor, any_module.act_fn(y))
        gate, up = y.chunk(2, dim=-1)
        if not hasattr(module, "_apply_gate"):
            return cast(Tensor, any_module.act_fn(gate) * up)
        if interleaved:
            y = torch.stack([gate, up], -1).flatten(-2)
        return cast(Tensor, any_module._apply_gate(y))

    return apply


def _is_right(experts: FloatExperts) -> bool:
    """Whether the module gives what its layout says, on a few random tokens."""
    weight, tokens, choices = experts.first, 3, min(2, experts.count)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, experts.hidden, generator=generator)
    x = x.to(weight.device, weight.dtype)
    index = torch.stack([torch.randperm(experts.count, generator=generator)[:choices] for _ in x])
    index = index.to(weight.device)
    weights = torch.rand(tokens, choices, generator=generator).to(weight.device, weight.dtype)
    module: Any = experts.module
    try:
        with torch.no_grad():
            if experts.routed:
                got = module(x, index, weights)
            else:
                x = x[:1].repeat(experts.count, 1)
                got = module(x)
            expected = float_forward(experts, x, index, weights)
    except Exception:  # a forward with other arguments may raise anything
        return False
    if not isinstance(got, Tensor) or got.numel() != expected.numel():
        return False
    if not bool(expected.isfinite().all()) and experts.finite_problem() is not None:
        return True  # whoever quantizes it names the parameter
    # A wrong layout is wrong by as much as the result is large; float types round by far less.
    difference = (got.reshape(expected.shape).float() - expected.float()).norm()
    return bool(difference <= 0.05 * expected.float().norm())


def float_forward(
    experts: FloatExperts, x: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """What the float module computes, [T, hidden]. The arguments after x count for routed experts only."""
    if not experts.routed:
        routing = Routing.of_sorted(x, experts.count)
        return torch.cat(
            [
                F.linear(
                    experts.inner_of(e, x[routing.of(e)]), experts.down(e), experts.down_bias(e)
                )
                for e in range(experts.count)
            ]
        )
    total = torch.zeros_like(x)
    for e in range(experts.count):
        token, choice = torch.where(top_k_index == e)
        if not len(token):
            continue
        y = F.linear(experts.inner_of(e, x[token]), experts.down(e), experts.down_bias(e))
        total.index_add_(0, token, (y * top_k_weights[token, choice, None]).to(x.dtype))
    return total
