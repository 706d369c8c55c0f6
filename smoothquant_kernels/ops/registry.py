"""The torch operator library: one namespace, one way to register an op.

Python owns each op's schema, fake (meta) kernel, CPU kernel and docstring. The CUDA extension, when it was
built, only adds CUDA kernels to the schemas defined here, so everything but those kernels imports, traces,
exports and tests itself without a GPU and without a compiler.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

NAMESPACE = "smoothquant_kernels"

# Kept alive for the life of the process: dropping a Library unregisters its ops.
_LIBRARY = torch.library.Library(NAMESPACE, "DEF")


def define_op(
    schema: str, *, cpu: Callable[..., Any], fake: Callable[..., Any]
) -> torch._ops.OpOverload:
    """Registers an op of this package and returns its callable overload.

    Args:
        schema: the op's signature without the namespace, e.g. ``"f(Tensor x) -> Tensor"``.
        cpu: the CPU kernel.
        fake: shape and dtype propagation, without reading data.
    """
    name = schema.split("(", 1)[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides))
    # Without no_grad, autograd would record some of the steps inside and give a part of the gradient as the whole.
    _LIBRARY.impl(name, torch.no_grad()(cpu), "CPU")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_LIBRARY)
    overload: torch._ops.OpOverload = getattr(getattr(torch.ops, NAMESPACE), name).default
    return overload


def eager_cpu(x: Tensor, *others: Tensor | None) -> bool:
    """Whether the CPU kernel can be called without the dispatcher, which costs a Python op some microseconds.

    Not where somebody looks at the ops as they go by: dynamo, which says so; other tracers, whose tensors are of a
    subclass or which sit in the stack of dispatch modes; autograd.
    """
    if not x.is_cpu:  # first: on a GPU each question more is a part of every call
        return False
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return False
    if torch._C._len_torch_dispatch_stack():
        return False
    if type(x) is not Tensor and type(x) is not torch.nn.Parameter:
        return False
    if not torch.is_grad_enabled():
        return True
    return not any(t is not None and t.requires_grad for t in (x, *others))
