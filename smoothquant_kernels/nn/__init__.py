"""Quantized layers, and what they need of float ones. Importing it registers the kinds of layers that come with it."""

import smoothquant_kernels.nn.linear  # noqa: F401
