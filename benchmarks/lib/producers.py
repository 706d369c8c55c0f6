"""The producers of int8 activations as cases of a benchmark: inputs, op, specification, eager chain and bytes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from smoothquant_kernels import ops, reference

EPS = 1e-5
SCHEMES = ("per_token", "static", "per_tensor")
#: Channels in a hundred that are OUTLIER times larger than the others, as in a large language model.
OUTLIER_PERCENT, OUTLIER = 1, 20.0
#: What one step of int8 in norms and activations may do: their float32 arithmetic rounds in another order.
STEPS_ALLOWED, SHARE_ALLOWED, SCALE_RTOL = 1, 0.01, 1e-5

Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """One line of the benchmark."""

    producer: str
    smooth: bool
    scheme: str
    dtype: torch.dtype
    m: int
    k: int
    rotation: int = 0  # channels of a group that are rotated

    @property
    def name(self) -> str:
        rotation = f"+rotate{self.rotation}" if self.rotation else ""
        return self.producer + ("+smooth" if self.smooth else "") + rotation

    def __str__(self) -> str:
        dtype = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}[self.dtype]
        return f"{self.name} {dtype} M {self.m} K {self.k} {self.scheme}"


@dataclass(frozen=True)
class Producer:
    """A public op and what it replaces.

    Attributes:
        names: inputs in the order in which `run`, `reference` and `chain` take them. `x`, `residual` and `gate` are
            [M, K], `fused` is [M, 2K], `weight` and `bias` are [K].
        run: the op: inputs and the quantizer's keyword arguments -> (x_q, x_scale) or (x_q, x_scale, x + residual).
        value: the specification's float32 value before it is quantized.
        chain: the same value as an unfused model computes it, in the model's own dtype.
        exact: the op must match the specification bit for bit.
    """

    names: tuple[str, ...]
    run: Callable[..., tuple[Tensor, ...]]
    value: Callable[..., Tensor]
    chain: Callable[..., Tensor]
    mlp: bool = False
    exact: bool = False


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu}
ACTIVATIONS |= {"gelu_tanh": partial(F.gelu, approximate="tanh"), "silu": F.silu}


def _plain(kind: str) -> Producer:
    def run(x: Tensor, **q: Any) -> tuple[Tensor, ...]:
        return ops.act_quantize(x, kind, **q)

    value = partial(reference.activation, kind=kind)
    return Producer(("x",), run, value, ACTIVATIONS[kind], mlp=True)


def _norm(kind: str, names: tuple[str, ...], residual: bool = False) -> Producer:
    """`rms` or `layer`: x, then its vectors `names`, then the residual."""
    value, chain = getattr(reference, f"{kind}_norm"), getattr(F, f"{kind}_norm")

    def run(x: Tensor, *rest: Tensor, **q: Any) -> tuple[Tensor, ...]:
        more = {"residual": rest[-1]} if residual else {}
        op: Any = getattr(ops, f"{kind}_norm_quantize")
        found: tuple[Tensor, ...] = op(x, *rest[: len(names)], EPS, **more, **q)
        return found

    return Producer(
        ("x", *names, *(["residual"] if residual else [])),
        run,
        lambda x, *vectors: value(x, *vectors, EPS),
        lambda x, *vectors: chain(x, x.shape[-1:], *vectors, EPS),
    )


PRODUCERS: dict[str, Producer] = {
    "quantize": Producer(
        ("x",), lambda x, **q: ops.quantize(x, **q), lambda x: x, lambda x: x, exact=True
    ),
    "rms_norm_quantize": _norm("rms", ("weight",)),
    "act_quantize:silu+gate": Producer(
        ("x", "gate"),
        lambda x, gate, **q: ops.act_quantize(x, "silu", gate=gate, **q),
        lambda x, gate: reference.activation(x, "silu", gate),
        lambda x, gate: F.silu(gate) * x,
        mlp=True,
    ),
    "rms_norm_quantize+residual": _norm("rms", ("weight",), residual=True),
    "layer_norm_quantize": _norm("layer", ("weight", "bias")),
    "layer_norm_quantize+residual": _norm("layer", ("weight", "bias"), residual=True),
    "act_quantize:silu_mul": Producer(
        ("fused",),
        lambda x, **q: ops.act_quantize(x, "silu_mul", **q),
        lambda x: reference.activation(x, "silu_mul"),
        lambda x: F.silu(x.chunk(2, -1)[0]) * x.chunk(2, -1)[1],
        mlp=True,
    ),
    **{f"act_quantize:{kind}": _plain(kind) for kind in ACTIVATIONS},
}


# --- inputs and bytes ---------------------------------------------------------------------------------------------


def make_inputs(case: Case, generator: torch.Generator) -> Inputs:
    """Random tensors by name; `inv_smooth` and `hadamard` where the case has them. The generator's device is theirs.

    The op does not read `hadamard` [rotation, rotation]; the eager chain multiplies by it.
    """
    device = generator.device

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    inputs = {}
    for name in PRODUCERS[case.producer].names:
        if name in ("weight", "bias"):
            value = 0.1 * normal(case.k) + (name == "weight")
        else:
            width = 2 * case.k if name == "fused" else case.k
            channels = torch.ones(width, device=device)
            count = max(1, width * OUTLIER_PERCENT // 100)
            channels[torch.randperm(width, generator=generator, device=device)[:count]] = OUTLIER
            value = normal(case.m, width) * channels
        inputs[name] = value.to(case.dtype)
    if case.smooth:
        uniform = torch.rand(case.k, generator=generator, device=device)
        inputs["inv_smooth"] = 0.5 + uniform
    if case.rotation:
        matrix = reference.rotate(torch.eye(case.rotation), case.rotation)
        inputs["hadamard"] = matrix.to(device, case.dtype)
    return inputs


def bytes_moved(case: Case) -> int:
    """Every input read once and every output written once: the least that any implementation moves."""
    element = case.dtype.itemsize
    read = 0
    for name in PRODUCERS[case.producer].names:
        elements = {"weight": case.k, "bias": case.k, "fused": 2 * case.m * case.k}
        read += element * elements.get(name, case.m * case.k)
    read += 4 * case.k if case.smooth else 0  # inv_smooth
    read += 4 if case.scheme == "static" else 0  # scale
    written = case.m * case.k  # x_q
    written += 4 * (1 if case.scheme == "per_tensor" else case.m)  # x_scale
    if "residual" in PRODUCERS[case.producer].names:
        written += element * case.m * case.k  # x + residual
    return read + written


# --- what is compared ---------------------------------------------------------------------------------------------


def quantizer_options(case: Case, inputs: Inputs, scale: Tensor | None) -> dict[str, Any]:
    """The keyword arguments that all producers share."""
    options: dict[str, Any] = {
        "inv_smooth": inputs.get("inv_smooth"),
        "rotation": case.rotation,
    }
    if case.scheme == "static":
        return options | {"scale": scale}
    return options | {"granularity": case.scheme.removeprefix("per_")}


def _split(case: Case, inputs: Inputs) -> tuple[list[Tensor], Tensor | None]:
    """The arguments without the residual, and the residual."""
    names = PRODUCERS[case.producer].names
    return [inputs[name] for name in names if name != "residual"], inputs.get("residual")


def run_op(case: Case, inputs: Inputs, scale: Tensor | None) -> tuple[Tensor, ...]:
    producer = PRODUCERS[case.producer]
    arguments = [inputs[name] for name in producer.names]
    return producer.run(*arguments, **quantizer_options(case, inputs, scale))


def run_reference(case: Case, inputs: Inputs, scale: Tensor | None) -> tuple[Tensor, ...]:
    arguments, residual = _split(case, inputs)
    arguments[0] = reference.add_residual(arguments[0], residual)
    value = PRODUCERS[case.producer].value(*arguments)
    quantized = reference.quantize(value, **quantizer_options(case, inputs, scale))
    return quantized if residual is None else (*quantized, arguments[0])


def run_eager(case: Case, inputs: Inputs, scale: Tensor | None) -> tuple[Tensor, ...]:
    """What a model without fused kernels does: each step a call of PyTorch, the norm in the model's dtype."""
    arguments, residual = _split(case, inputs)
    if residual is not None:
        arguments[0] = arguments[0] + residual
    v = PRODUCERS[case.producer].chain(*arguments).float()
    if case.smooth:
        v = v * inputs["inv_smooth"]
    if case.rotation:
        groups = v.to(case.dtype).unflatten(-1, (-1, case.rotation))
        v = (groups @ inputs["hadamard"]).flatten(-2).float()
    if case.scheme == "per_token":
        x_scale = v.abs().amax(-1) / 127
    elif case.scheme == "per_tensor":
        x_scale = v.abs().amax().reshape(1) / 127
    else:
        assert scale is not None
        x_scale = scale
    x_q = (v * x_scale.reciprocal()[:, None]).round().clamp(-127, 127).to(torch.int8)
    return (x_q, x_scale) if residual is None else (x_q, x_scale, arguments[0])


def static_scale(case: Case, inputs: Inputs) -> Tensor | None:
    """What calibration on these inputs would find, for the static scheme."""
    if case.scheme != "static":
        return None
    return run_reference(replace(case, scheme="per_tensor"), inputs, None)[1]


def difference(
    actual: tuple[Tensor, ...],
    expected: tuple[Tensor, ...],
    *,
    steps: int,
    share: float,
    scale_rtol: float,
) -> str:
    """Empty, or one sentence on why `actual` is wrong.

    Args:
        steps, share: int8 elements may differ by at most `steps`, at most this share of them.
        scale_rtol: relative tolerance of x_scale. x + residual must always be equal.
    """
    if len(actual) != len(expected):
        return f"{len(actual)} results, not {len(expected)}"
    (x_q, x_scale, *total), (right_q, right_scale, *right_total) = actual, expected
    if x_q.shape != right_q.shape or x_q.dtype != torch.int8:
        return f"x_q is {x_q.dtype} {tuple(x_q.shape)}, not torch.int8 {tuple(right_q.shape)}"
    apart = (x_q.to(torch.int16) - right_q.to(torch.int16)).abs()
    wrong = int((apart > 0).sum())
    if int(apart.amax()) > steps or wrong > share * apart.numel():
        return f"{wrong} of {apart.numel()} elements of x_q differ, by up to {int(apart.amax())}"
    # A static scale may come back as [1] or, from the ops, as [M].
    ratio = (x_scale.double() / right_scale.double() - 1).abs()
    if not bool((ratio <= scale_rtol).all()):  # NaN is not
        return f"x_scale differs by up to {float(ratio.amax()):.1e}"
    if total and not torch.equal(total[0], right_total[0]):
        return "x + residual differs"
    return ""


def wrong_op(case: Case, actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> str:
    """The op against the specification."""
    if PRODUCERS[case.producer].exact:
        return difference(actual, expected, steps=0, share=0, scale_rtol=0)
    return difference(
        actual, expected, steps=STEPS_ALLOWED, share=SHARE_ALLOWED, scale_rtol=SCALE_RTOL
    )


def wrong_baseline(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> str:
    """A chain that rounds to fp16 or bf16 between its steps: close enough to be the same work."""
    return difference(actual, expected, steps=3, share=1, scale_rtol=0.02)
