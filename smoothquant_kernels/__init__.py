"""SmoothQuant W8A8 INT8 inference for Hugging Face models: smoothing that proves itself, exact kernels, one package."""

from __future__ import annotations

from smoothquant_kernels import ops
from smoothquant_kernels._transformers import register_transformers
from smoothquant_kernels.calibrate import ActivationStatistics, calibrate_model
from smoothquant_kernels.checkpoint import load_quantized, save_quantized
from smoothquant_kernels.config import SmoothQuantConfig
from smoothquant_kernels.convert import quantize_model, smooth_and_quantize
from smoothquant_kernels.errors import SmoothQuantError
from smoothquant_kernels.linear import QuantizedActivation, W8A8Linear
from smoothquant_kernels.report import make_report
from smoothquant_kernels.search import SearchResult, search_config
from smoothquant_kernels.smooth import smooth_lm
from smoothquant_kernels.stream import quantize_streamed

__all__ = [
    "ActivationStatistics",
    "QuantizedActivation",
    "SearchResult",
    "SmoothQuantConfig",
    "SmoothQuantError",
    "W8A8Linear",
    "calibrate_model",
    "load_quantized",
    "make_report",
    "ops",
    "quantize_model",
    "quantize_streamed",
    "register_transformers",
    "save_quantized",
    "search_config",
    "smooth_and_quantize",
    "smooth_lm",
]
