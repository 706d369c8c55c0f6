"""Quantized layers, and what they need from float ones. Importing this package registers its own kinds of layers."""

import smoothquant_kernels.nn.experts.kind
import smoothquant_kernels.nn.linear
import smoothquant_kernels.nn.outlier_linear
import smoothquant_kernels.nn.w4a8_linear  # noqa: F401
