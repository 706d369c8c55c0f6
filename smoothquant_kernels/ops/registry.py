"""Ops, each described once: one function gives a torch op its schema, checks, result shapes and documentation.

The body of a function under `@op` checks the arguments and describes the results with `result`. It computes nothing. It
runs as the fake kernel (meta tensors, torch.compile, torch.export), before a CPU kernel, and after a CUDA kernel has
refused its arguments, so that a wrong argument raises the same exception everywhere.

Kernels come from backends. A Python backend registers CPU kernels with `cpu_kernel`; the compiled libraries register
theirs with the dispatcher. So everything but compiled kernels imports, traces, exports and tests itself without a
compiler.
"""

from __future__ import annotations

import functools
import inspect
import string
from collections.abc import Callable
from importlib import import_module
from typing import Any, NamedTuple, ParamSpec, TypeVar, cast

import torch
from torch import Tensor

NAMESPACE = "smoothquant_kernels"
#: Modules that register kernels, imported by name once all ops are described. The first one with a CPU kernel for an op
#: runs it; the reference comes last.
BACKENDS = ("cpu_native", "onednn", "attention", "reference", "cuda")

# Kept alive for the life of the process: dropping a Library unregisters its ops.
LIBRARY = torch.library.Library(NAMESPACE, "DEF")
#: Names of all ops, in the order of their descriptions.
OPS: list[str] = []
_CPU_KERNELS: dict[str, Callable[..., Any]] = {}
_ON_CPU: dict[
    str, Callable[..., Any]
] = {}  # the same with their checks, as the dispatcher calls them
_loaded = False
#: Ops whose CPU kernel is compiled: a call of a CPU tensor is one call of the dispatcher, as on a GPU.
COMPILED: set[str] = set()
_SCHEMA_TYPES = {
    "Tensor": "Tensor",
    "Tensor | None": "Tensor?",
    "torch.dtype": "ScalarType",
    "tuple[Tensor, Tensor]": "(Tensor, Tensor)",
    "None": "()",
    **{name: name for name in ("str", "int", "float", "bool")},
}

P = ParamSpec("P")
R = TypeVar("R")
Kernel = TypeVar("Kernel", bound=Callable[..., Any])


class _Result(NamedTuple):
    like: Tensor
    shape: tuple[int, ...]
    dtype: torch.dtype


def result(like: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Describes a contiguous result on the device of `like`. Only the fake kernel makes a tensor of it."""
    return cast(Tensor, _Result(like, shape, dtype))


def _made(described: Any) -> Any:
    if described is None:
        return None
    if isinstance(described, _Result):
        return described.like.new_empty(described.shape, dtype=described.dtype)
    return tuple(map(_made, described))


def op(
    *,
    shortcut: bool = False,
    optional_result: str | None = None,
    writes: tuple[str, ...] = (),
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Makes a torch op of a function that checks its arguments and describes its results.

    Args:
        shortcut: whether plain CPU tensors go to a CPU kernel in Python without the dispatcher (`eager_cpu`). The
            dispatcher costs a Python kernel some microseconds, but the profiler and vmap see only the calls that pass
            through it.
        optional_result: a keyword argument without which the last of three results is left out. The torch op itself
            returns an empty tensor there, because a schema has a fixed number of results.
        writes: the arguments that the op changes. Such an op returns None: torch.compile can then make it functional.

    Returns:
        A decorator. The decorated function calls the op, with the signature and docstring of its description.
    """

    def decorate(describe: Callable[P, R]) -> Callable[P, R]:
        name = describe.__name__
        signature = inspect.signature(describe)
        parameters = list(signature.parameters.values())
        LIBRARY.define(
            _schema(name, signature, writes, three_results=optional_result is not None),
            tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides),
        )
        OPS.append(name)
        by_position = sum(p.kind is not p.KEYWORD_ONLY for p in parameters)
        defaults = [(p.name, p.default) for p in parameters]

        def described(*args: Any, **kwargs: Any) -> Any:
            # The op takes all arguments by position, `describe` some of them by name only.
            names = [key for key, _ in defaults[by_position : len(args)]]
            kwargs |= zip(names, args[by_position:], strict=True)
            return describe(*args[:by_position], **kwargs)

        def on_cpu(*args: Any, **kwargs: Any) -> Any:
            described(*args, **kwargs)
            rest = [kwargs.get(key, default) for key, default in defaults[len(args) :]]
            return _CPU_KERNELS[name](*args, *rest)

        # Without no_grad, autograd would record some of the steps inside and give a part of the gradient as the whole.
        # A compiled kernel calls no op that autograd records between its inputs and its results.
        _ON_CPU[name] = torch.no_grad()(on_cpu)
        if _loaded:
            serve_in_python(name)
        torch.library.register_fake(
            f"{NAMESPACE}::{name}",
            lambda *args, **kwargs: _made(described(*args, **kwargs)),
            lib=LIBRARY,
        )
        overload = getattr(getattr(torch.ops, NAMESPACE), name).default
        source = _caller(name, parameters, shortcut, optional_result)
        made: dict[str, Any] = {}
        exec(source, globals(), made)
        call = made["make"](described, on_cpu, overload, getattr(overload, "_op", overload))
        return cast(Callable[P, R], functools.wraps(describe)(call))

    return decorate


def _caller(
    name: str, parameters: list[inspect.Parameter], shortcut: bool, optional_result: str | None
) -> str:
    """The source of a function that makes the public function of an op.

    It is written out, like the methods of a dataclass, because Python and torch take a third less time for a small call
    with many arguments when Python itself puts them in order. torch looks each one up that comes by name, and each
    default, with a new string. `direct` is what the overload calls; dynamo traces the overload only.
    """
    signature: list[str] = []
    arguments: list[str] = []
    by_name = False
    for p in parameters:
        if p.kind is p.KEYWORD_ONLY and "*" not in signature:
            signature.append("*")
        signature.append(p.name if p.default is p.empty else f"{p.name}={p.default!r}")
        # A schema cannot hold a dtype as a default, so there it is an argument by name.
        by_name |= isinstance(p.default, torch.dtype)
        arguments.append(f"{p.name}={p.name}" if by_name else p.name)
    given, first = ", ".join(arguments), parameters[0].name
    lines = [f"def {name}({', '.join(signature)}):"]
    if shortcut:
        # With compiled kernels, each further question is a part of every call.
        values = ", ".join(p.name for p in parameters)
        lines += [
            f"    if {name!r} not in COMPILED and {first}.is_cpu and eager_cpu({first}, ({values},)):",
            f"        return on_cpu({given})",
        ]
    lines += [
        "    try:",
        f"        results = (overload if torch.compiler.is_compiling() else direct)({given})",
        "    except RuntimeError:",  # all that C++ can throw through torch's stable ABI
        f"        _raise_what_is_wrong(described, {given})",
        "        raise",
        f"    return tuple(results[:-1]) if {optional_result} is None else results"
        if optional_result
        else "    return results",
    ]
    body = "\n".join(f"    {line}" for line in lines)
    return f"def make(described, on_cpu, overload, direct):\n{body}\n    return {name}\n"


def serve_in_python(name: str, library: torch.library.Library = LIBRARY) -> None:
    """Registers an op's CPU kernel in Python with the dispatcher.

    Args:
        name: the op.
        library: keeps the registration. Tests give one of their own, to end it.
    """
    library.impl(name, _ON_CPU[name], "CPU", allow_override=library is not LIBRARY)


def _raise_what_is_wrong(described: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    try:
        described(*args, **kwargs)
    except (TypeError, ValueError) as error:
        raise error from None


def _schema(
    name: str, signature: inspect.Signature, writes: tuple[str, ...], *, three_results: bool
) -> str:
    """The op's signature in torch's schema language, as the C++ kernels read their arguments."""
    parts: list[str] = []
    for p in signature.parameters.values():
        default = ""
        if isinstance(p.default, torch.dtype):  # no default, so it can follow others by name only
            parts.append("*")
        elif p.default is not p.empty:
            value = f'"{p.default}"' if isinstance(p.default, str) else p.default
            default = f"={value}"
        kind = _SCHEMA_TYPES[p.annotation]
        if p.name in writes:  # each an alias of nothing else
            kind = kind.replace("Tensor", f"Tensor({string.ascii_lowercase[len(parts)]}!)")
        parts.append(f"{kind} {p.name}{default}")
    results = (
        "(Tensor, Tensor, Tensor)" if three_results else _SCHEMA_TYPES[signature.return_annotation]
    )
    return f"{name}({', '.join(parts)}) -> {results}"


def cpu_kernel(name: str) -> Callable[[Kernel], Kernel]:
    """Registers a CPU kernel for an op, unless a backend that comes before in `BACKENDS` has one.

    A kernel is called with all arguments of the op by position, checked. It returns contiguous tensors.
    """

    def register(kernel: Kernel) -> Kernel:
        _CPU_KERNELS.setdefault(name, kernel)
        return kernel

    return register


def cpu(name: str) -> Callable[..., Any]:
    """The CPU kernel of an op in Python, for kernels that are made of others. It also exists beside a compiled one."""
    return _CPU_KERNELS[name]


def load_backends() -> None:
    """Imports the backends, which register their kernels."""
    global _loaded
    for name in BACKENDS:
        backend = import_module(f"{NAMESPACE}.backends.{name}")
        # A library has registered these kernels with the dispatcher, and no Python kernel may replace them.
        COMPILED.update(getattr(backend, "COMPILED_ON_CPU", ()))
    for name in _ON_CPU.keys() - COMPILED:
        serve_in_python(name)
    _loaded = True


def eager_cpu(x: Tensor, args: tuple[Any, ...]) -> bool:
    """Whether a CPU kernel can be called without the dispatcher, which costs a Python op some microseconds.

    Not where somebody looks at the ops as they go by: dynamo, which says so; other tracers, whose tensors are of a
    subclass or which sit in the stack of dispatch modes; autograd.
    """
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return False
    if torch._C._len_torch_dispatch_stack():
        return False
    if type(x) is not Tensor and type(x) is not torch.nn.Parameter:
        return False
    if not torch.is_grad_enabled():
        return True
    return not any(isinstance(t, Tensor) and t.requires_grad for t in args)
