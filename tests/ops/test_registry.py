"""The description of an op, and the choice of its kernel."""

from __future__ import annotations

import importlib
import subprocess
import sys
from typing import Any

import pytest
import torch

from smoothquant_kernels import ops
from smoothquant_kernels.backends import onednn, reference
from smoothquant_kernels.ops import registry
from tests.support.compare import assert_all_bitwise_equal
from tests.support.op_calls import Call, each_call

#: The C++ kernels read their arguments from the dispatcher's stack in this order.
QUANTIZER = (
    'Tensor? inv_smooth=None, Tensor? scale=None, str granularity="token", int k_multiple=1, '
    "int rotation=0"
)
GEMM = "Tensor x_q, Tensor w_q, Tensor x_scale, Tensor w_scale"
SCHEMAS = {
    "quantize": f"(Tensor x, {QUANTIZER}) -> (Tensor, Tensor)",
    "rms_norm_quantize": "(Tensor x, Tensor weight, float eps, Tensor? residual=None, "
    f"{QUANTIZER}) -> (Tensor, Tensor, Tensor)",
    "layer_norm_quantize": "(Tensor x, Tensor? weight, Tensor? bias, float eps, "
    f"Tensor? residual=None, {QUANTIZER}) -> (Tensor, Tensor, Tensor)",
    "act_quantize": f"(Tensor x, str kind, Tensor? gate=None, {QUANTIZER}) -> (Tensor, Tensor)",
    "gemm_s8": f"({GEMM}, Tensor? bias=None, Tensor? residual=None, *, ScalarType out_dtype) -> Tensor",
    "gemm_s8_requant": f"({GEMM}, Tensor out_scale, Tensor? bias=None, bool relu=False) -> Tensor",
    "gemm_s8_gated": f'({GEMM}, Tensor out_scale, str kind="silu_mul", Tensor? bias=None, '
    "Tensor? inv_smooth=None, *, ScalarType dtype) -> (Tensor, Tensor)",
    "linear_s8": "(Tensor x, Tensor w_q, Tensor w_scale, Tensor? bias=None, Tensor? residual=None, "
    'Tensor? inv_smooth=None, Tensor? scale=None, str granularity="token", int rotation=0) -> Tensor',
    "fused_linear_s8": "(Tensor x, str kind, Tensor w_q, Tensor w_scale, Tensor? norm_weight=None, "
    "Tensor? norm_bias=None, float eps=0., Tensor? gate=None, Tensor? bias=None, Tensor? residual=None, "
    'Tensor? inv_smooth=None, Tensor? scale=None, str granularity="token", int rotation=0) -> Tensor',
    "gemm_w4a8": "(Tensor x_q, Tensor w_q4, Tensor w_group, Tensor x_scale, Tensor w_scale, Tensor? bias=None, "
    "Tensor? residual=None, *, ScalarType out_dtype) -> Tensor",
    "linear_w4a8": "(Tensor x, Tensor w_q4, Tensor w_group, Tensor w_scale, Tensor? bias=None, Tensor? residual=None, "
    'Tensor? inv_smooth=None, Tensor? scale=None, str granularity="token", int rotation=0) -> Tensor',
    "grouped_gemm_s8": f"({GEMM}, Tensor offsets, Tensor? rows=None, Tensor? bias=None, *, "
    "ScalarType out_dtype) -> Tensor",
    "combine_experts": "(Tensor y, Tensor position, Tensor weights) -> Tensor",
    "kv_append": "(Tensor k, Tensor v, Tensor(c!) k_cache, Tensor(d!) v_cache, Tensor(e!)? k_scale=None, "
    "Tensor(f!)? v_scale=None, Tensor? positions=None, Tensor? block_table=None, Tensor? k_inv_smooth=None, "
    "Tensor? v_inv_smooth=None, Tensor? cos=None, Tensor? sin=None, int rotation=0, bool ring=False) -> ()",
    "decode_attention_s8": "(Tensor q, Tensor k_cache, Tensor v_cache, float scale, Tensor? k_scale=None, "
    "Tensor? v_scale=None, Tensor? lengths=None, Tensor? block_table=None, Tensor? mask=None, "
    "Tensor? k_smooth=None, Tensor? v_smooth=None, int rotation=0, int window=0, bool ring=False) -> Tensor",
    "_gemm_s8_tile": f"({GEMM}, Tensor? bias=None, Tensor? residual=None, *, ScalarType out_dtype, "
    "int tile=-1, int splits=0) -> Tensor",
    "_saturate_s8": "(Tensor x) -> Tensor",
}


def test_schemas_equal_those_of_the_binding() -> None:
    assert set(ops.OPS) == SCHEMAS.keys()
    for name, schema in SCHEMAS.items():
        found = getattr(torch.ops.smoothquant_kernels, name).default._schema
        assert str(found) == f"smoothquant_kernels::{name}{schema}"


def test_ops_are_listed_in_the_order_of_the_documentation() -> None:
    public = [name for name in ops.OPS if not name.startswith("_")]
    assert public == [
        "quantize",
        "rms_norm_quantize",
        "layer_norm_quantize",
        "act_quantize",
        "gemm_s8",
        "gemm_s8_requant",
        "gemm_s8_gated",
        "linear_s8",
        "fused_linear_s8",
        "gemm_w4a8",
        "linear_w4a8",
        "grouped_gemm_s8",
        "combine_experts",
        "kv_append",
        "decode_attention_s8",
    ]
    assert all(getattr(ops, name).__doc__ for name in public)


def test_the_first_backend_with_a_kernel_runs_it() -> None:
    assert registry.cpu("gemm_s8").__module__ == onednn.__name__
    assert registry.cpu("act_quantize").__module__ == reference.__name__


@each_call
def test_the_reference_backend_serves_every_op(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = call.eager()
    monkeypatch.setattr(registry, "_CPU_KERNELS", {})
    importlib.reload(reference)
    assert registry._CPU_KERNELS.keys() == set(ops.OPS)
    assert_all_bitwise_equal(call.eager(), expected)


#: A library whose kernel raises C++'s only exception, for arguments that the description refuses and for others.
KERNEL_THAT_REFUSES = """
from __future__ import annotations  # a schema is made of the annotations as they are written
import torch
from torch import Tensor
from smoothquant_kernels.ops import registry
from smoothquant_kernels.ops.registry import cpu_kernel, op, result

@op()
def doubled(x: Tensor, *, times: int = 1) -> Tensor:
    "Twice x, some times over."
    if x.dtype != torch.float32:
        raise TypeError("doubled: x must be float32")
    if times < 1:
        raise ValueError("doubled: times must be at least 1")
    return result(x, tuple(x.shape), x.dtype)

def refuses(*arguments, **options):
    raise RuntimeError("from C++")

x = torch.ones(3)
try:
    doubled(x)
except KeyError:
    print("no kernel yet")

@cpu_kernel("doubled")
def kernel(x, times):
    return x * 2**times

print(doubled(x, times=3).tolist(), doubled(x=x).tolist(), doubled.__doc__)
print(doubled(x.to("meta")).shape, torch.compile(doubled, fullgraph=True, backend="eager")(x).tolist())
registry.LIBRARY.impl("doubled", refuses, "CPU", allow_override=True)
registry.eager_cpu = lambda *call: False
for wrong, times in ((x.double(), 1), (x, 0), (x, 1)):
    try:
        doubled(wrong, times=times)
    except Exception as error:
        print(type(error).__name__, error, error.__cause__, error.__suppress_context__)
"""


@pytest.mark.slow
def test_a_new_op_is_defined_registered_and_checked() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", KERNEL_THAT_REFUSES],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "no kernel yet",
        "[8.0, 8.0, 8.0] [2.0, 2.0, 2.0] Twice x, some times over.",
        "torch.Size([3]) [2.0, 2.0, 2.0]",
        "TypeError doubled: x must be float32 None True",
        "ValueError doubled: times must be at least 1 None True",
        "RuntimeError from C++ None False",
    ]


@pytest.mark.parametrize("name", [name for name in ops.OPS if not name.startswith("_")])
def test_a_missing_argument_raises_pythons_own_error(name: str) -> None:
    with pytest.raises(TypeError, match=f"{name}.* missing .* required positional argument"):
        getattr(ops, name)()


def test_norms_and_activations_use_the_dispatcher() -> None:
    """vmap and the profiler see these ops, and the schema refuses an eps that is not a number."""
    x, weight = torch.randn(3, 4, 32), torch.rand(32)
    x_q, x_scale = torch.func.vmap(lambda a: ops.rms_norm_quantize(a, weight, 1e-6))(x)
    for i, row in enumerate(x):
        assert_all_bitwise_equal((x_q[i], x_scale[i]), ops.rms_norm_quantize(row, weight, 1e-6))
    wrong: Any = 1j
    with pytest.raises(RuntimeError, match="Expected a value of type 'float' for argument 'eps'"):
        ops.rms_norm_quantize(x, weight, wrong)
