"""The public ops, named by what they compute.

Each is a `torch.library` op (`torch.ops.smoothquant_kernels.*`) with a fake kernel, so it works under `torch.compile
(fullgraph=True)` and `torch.export`. The functions here are what users call. The numbers are those of the package
`reference`.

Shapes: `M` is the number of tokens, the product of all leading dimensions of `x` [..., K].
"""

from __future__ import annotations

# In the order in which `doctor` and the documentation list the ops.
# isort: off
from smoothquant_kernels.ops.quantize import quantize
from smoothquant_kernels.ops.producers import act_quantize, layer_norm_quantize, rms_norm_quantize
from smoothquant_kernels.ops.gemm import gemm_s8, gemm_s8_gated, gemm_s8_requant
from smoothquant_kernels.ops.linear import fused_linear_s8, linear_s8
from smoothquant_kernels.ops.gemm_w4 import gemm_w4a8, linear_w4a8
from smoothquant_kernels.ops.experts import combine_experts, grouped_gemm_s8
from smoothquant_kernels.ops.kv_cache import kv_append
from smoothquant_kernels.ops.attention import decode_attention_s8
from smoothquant_kernels.ops import registry
# isort: on

__all__ = [
    "OPS",
    "act_quantize",
    "combine_experts",
    "decode_attention_s8",
    "fused_linear_s8",
    "gemm_s8",
    "gemm_s8_gated",
    "gemm_s8_requant",
    "gemm_w4a8",
    "grouped_gemm_s8",
    "kv_append",
    "layer_norm_quantize",
    "linear_s8",
    "linear_w4a8",
    "quantize",
    "rms_norm_quantize",
]

#: Names of all ops, with the private ones that serve tests and the tuner.
OPS = tuple(registry.OPS)

registry.load_backends()
