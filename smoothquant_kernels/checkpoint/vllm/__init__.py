"""The vLLM plugin: vLLM serves the folders that `save_quantized` wrote, with the kernels of this package.

vLLM finds `register` by the entry point `vllm.general_plugins` and calls it in each of its processes. vLLM is imported
only there.
"""

from __future__ import annotations

import warnings

#: The releases of vLLM that the tests ran with (`make test-vllm`).
TESTED = ("0.27.1", "0.32.0")


def register() -> None:
    """Registers our method, the `quant_method` of config.json, with vLLM. A second call changes nothing.

    In a vLLM that lacks a class which the method needs, it warns and registers nothing. An error would keep that vLLM
    from serving any model. vLLM then refuses our folders itself, as an unknown quantization method.

    Equivalent to:
        vllm.model_executor.layers.quantization.register_quantization_config("smoothquant_kernels")(Config)

    Source: vLLM, plugin system (`vllm.general_plugins`).
    """
    try:
        from smoothquant_kernels.checkpoint.vllm.method import register_method

        register_method()
    except Exception as error:
        warnings.warn(
            f"this vLLM cannot serve checkpoints of smoothquant-kernels ({type(error).__name__}: {error}): install a "
            f"vLLM with which the plugin was tested, {' or '.join(TESTED)}.",
            stacklevel=2,
        )
