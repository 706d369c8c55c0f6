"""SmoothQuant W8A8 INT8 inference for Hugging Face models: verified smoothing, exact kernels, one package.

Each name is imported on first use, so that `smoothquant-kernels --help` does not wait for torch.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from smoothquant_kernels import ops
    from smoothquant_kernels.adapters.peft_hook import register_peft
    from smoothquant_kernels.checkpoint.load import load_quantized
    from smoothquant_kernels.checkpoint.save import save_quantized
    from smoothquant_kernels.checkpoint.transformers_hook import register_transformers
    from smoothquant_kernels.config import SmoothQuantConfig
    from smoothquant_kernels.errors import SmoothQuantError
    from smoothquant_kernels.fusion.optimize import optimize_for_inference, undo_optimization
    from smoothquant_kernels.fusion.record import fusion_info, fusion_spills
    from smoothquant_kernels.kv_cache.attention import use_int8_attention
    from smoothquant_kernels.kv_cache.cache import Int8KVCache
    from smoothquant_kernels.kv_cache.calibration import KVCalibration
    from smoothquant_kernels.nn.experts.layer import W8A8Experts
    from smoothquant_kernels.nn.linear import W8A8Linear
    from smoothquant_kernels.nn.operands import QuantizedActivation
    from smoothquant_kernels.nn.outlier_linear import OutlierLinear
    from smoothquant_kernels.nn.parallel.model import ColwiseW8A8, RowwiseW8A8, parallelize_model
    from smoothquant_kernels.nn.w4a8_linear import W4A8Linear
    from smoothquant_kernels.plan import apply_plan, read_plan
    from smoothquant_kernels.report.report import make_report
    from smoothquant_kernels.search.plan_search import PlanSearch, search_plan
    from smoothquant_kernels.search.result import SearchResult
    from smoothquant_kernels.search.search import search_config
    from smoothquant_kernels.smoothing.calibrate import calibrate_model
    from smoothquant_kernels.smoothing.convert import quantize_model, smooth_and_quantize
    from smoothquant_kernels.smoothing.kv_cache import calibrate_kv_cache
    from smoothquant_kernels.smoothing.smooth import smooth_lm
    from smoothquant_kernels.smoothing.statistics import ActivationStatistics
    from smoothquant_kernels.streaming.stream import quantize_streamed

__all__ = [
    "ActivationStatistics",
    "ColwiseW8A8",
    "Int8KVCache",
    "KVCalibration",
    "OutlierLinear",
    "PlanSearch",
    "QuantizedActivation",
    "RowwiseW8A8",
    "SearchResult",
    "SmoothQuantConfig",
    "SmoothQuantError",
    "W4A8Linear",
    "W8A8Experts",
    "W8A8Linear",
    "apply_plan",
    "calibrate_kv_cache",
    "calibrate_model",
    "fusion_info",
    "fusion_spills",
    "load_quantized",
    "make_report",
    "ops",
    "optimize_for_inference",
    "parallelize_model",
    "quantize_model",
    "quantize_streamed",
    "read_plan",
    "register_peft",
    "register_transformers",
    "save_quantized",
    "search_config",
    "search_plan",
    "smooth_and_quantize",
    "smooth_lm",
    "undo_optimization",
    "use_int8_attention",
]

_MODULES = {
    "ActivationStatistics": "smoothing.statistics",
    "ColwiseW8A8": "nn.parallel.model",
    "Int8KVCache": "kv_cache.cache",
    "KVCalibration": "kv_cache.calibration",
    "OutlierLinear": "nn.outlier_linear",
    "PlanSearch": "search.plan_search",
    "QuantizedActivation": "nn.operands",
    "RowwiseW8A8": "nn.parallel.model",
    "SearchResult": "search.result",
    "SmoothQuantConfig": "config",
    "SmoothQuantError": "errors",
    "W4A8Linear": "nn.w4a8_linear",
    "W8A8Experts": "nn.experts.layer",
    "W8A8Linear": "nn.linear",
    "apply_plan": "plan",
    "calibrate_kv_cache": "smoothing.kv_cache",
    "calibrate_model": "smoothing.calibrate",
    "fusion_info": "fusion.record",
    "fusion_spills": "fusion.record",
    "load_quantized": "checkpoint.load",
    "make_report": "report.report",
    "optimize_for_inference": "fusion.optimize",
    "parallelize_model": "nn.parallel.model",
    "quantize_model": "smoothing.convert",
    "quantize_streamed": "streaming.stream",
    "read_plan": "plan",
    "register_peft": "adapters.peft_hook",
    "register_transformers": "checkpoint.transformers_hook",
    "save_quantized": "checkpoint.save",
    "search_config": "search.search",
    "search_plan": "search.plan_search",
    "smooth_and_quantize": "smoothing.convert",
    "smooth_lm": "smoothing.smooth",
    "undo_optimization": "fusion.optimize",
    "use_int8_attention": "kv_cache.attention",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    if not name.startswith("__"):
        try:
            return import_module(f"{__name__}.{name}")  # a module of this package, such as `ops`
        except ModuleNotFoundError as error:
            if error.name != f"{__name__}.{name}":
                raise
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


# With torch loaded, users may expect this import alone to define torch.ops.smoothquant_kernels, and it costs little.
if "torch" in sys.modules:
    import_module(f"{__name__}.ops")
