"""`smoothquant-kernels doctor`: what is installed here and what will run where."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import torch
from rich.markup import escape
from rich.table import Table

from smoothquant_kernels.backends import cpu_native, onednn
from smoothquant_kernels.backends.cuda import (
    build_info,
    described_library,
    dispatch_tables,
    extension_status,
    has_cuda_kernel,
)
from smoothquant_kernels.backends.tuned_tiles import tune_cache
from smoothquant_kernels.ops import OPS as ALL_OPS
from smoothquant_kernels.storage.document import Document
from smoothquant_kernels.storage.versions import PACKAGE, installed_version

#: The public ops; the private ones serve tests and the tuner.
OPS = tuple(op for op in ALL_OPS if not op.startswith("_"))

_PACKAGES = ("transformers", "safetensors", "accelerate", "gguf", "matplotlib", "datasets")
# Names in /proc/cpuinfo (x86, then ARM) of the features that decide how fast int8 products are.
_CPU_FLAGS = (
    "avx2", "avx512f", "avx_vnni", "avx512_vnni", "avx_vnni_int8", "amx_int8",
    "avx512_bf16", "asimddp", "i8mm", "sve",
)  # fmt: skip
_MODES = {
    "onednn_amx": "int8 tiles (AMX): the fast way",
    "onednn_vnni": "8-bit dot products with 32-bit sums (VNNI or the like): the fast way",
    "onednn_split": "no VNNI: positive and negative activations are multiplied apart, twice the work, "
    "the same bits",
    "onednn_float": "no usable oneDNN: exact float32 products, slower than float, the same bits",
}
_LEVELS = {
    "amx": "int8 tiles (AMX)",
    "avx512_vnni": "8-bit dot products on 512 bits (AVX512-VNNI)",
    "avx_vnni": "8-bit dot products on 256 bits (AVX-VNNI)",
    "avx2": "16-bit products on 256 bits (AVX2)",
    "portable": "plain C++, slow: this processor or this build has none of the faster levels",
}


def work() -> Document:
    """Everything that explains where int8 layers run on this machine, and why not elsewhere."""
    return {
        "package": installed_version(PACKAGE),
        "location": str(Path(__file__).resolve().parents[1]),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "packages": {name: installed_version(name) for name in _PACKAGES},
        "cuda": _cuda(),
        "extension": _extension(),
        "cpu": _cpu(),
        "verdict": _verdict(),
    }


def _cuda() -> dict[str, Any]:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    devices = []
    for index in range(count):
        properties = torch.cuda.get_device_properties(index)
        devices.append(
            {
                "name": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "memory_bytes": properties.total_memory,
            }
        )
    return {"torch_built_with": torch.version.cuda, "devices": devices}


def _extension() -> dict[str, Any]:
    status = extension_status()
    return {
        "available": status.available,
        "reason": status.reason,
        "archs": list(status.archs),
        "cutlass_version": status.cutlass_version,
        "cuda_version": status.cuda_version,
        "torch_target": status.torch_target,
        "cuda_kernels": [op for op in OPS if has_cuda_kernel(op)],
        "tables": dispatch_tables(),
        "not_described": described_library()[1] if status.available else "",
        "tuning": bool(build_info().get("tuning")),
        "tune_cache": tune_cache().state,  # read after the GPU queries, which start CUDA
        "tuned": tune_cache().in_use,
    }


def _cpu() -> dict[str, Any]:
    name, flags = _cpuinfo(Path("/proc/cpuinfo"))
    status, level, mode = cpu_native.cpu_status(), cpu_native.level(), onednn.gemm_mode()
    return {
        "name": name or platform.processor() or platform.machine(),
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
        "features": [flag for flag in _CPU_FLAGS if flag in flags],
        "threads": torch.get_num_threads(),
        "library": {
            "available": status.available,
            "reason": status.reason,
            "levels": list(status.levels),
            "usable_levels": list(cpu_native.levels_here()),
            "compiler": status.compiler,
            "torch_target": status.torch_target,
        },
        "int8": level or mode,  # what computes int8 products now
        "int8_meaning": _LEVELS[level] if level else _MODES[mode],
    }


def _cpuinfo(path: Path) -> tuple[str, set[str]]:
    """The name and flags of the first processor; empty if the file does not exist (not Linux)."""
    try:
        lines = path.read_text().split("\n\n")[0].splitlines()
    except OSError:
        return "", set()
    fields = {k.strip(): v.strip() for k, _, v in (line.partition(":") for line in lines)}
    return fields.get("model name", ""), set(
        (fields.get("flags") or fields.get("Features") or "").split()
    )


def _verdict() -> list[str]:
    """What will run where, in sentences."""
    status, gpus = extension_status(), torch.cuda.is_available()
    missing = [op for op in OPS if not has_cuda_kernel(op)]
    sentences = []
    if gpus and status.available:
        sentences.append(
            "models on a GPU run on the CUDA kernels"
            + (f", but these ops have none yet: {', '.join(missing)}." if missing else ".")
        )
    elif gpus:
        sentences.append(f"models on a GPU do not run: {status.reason}.")
    elif status.available:
        sentences.append("the CUDA kernels are ready, but torch sees no GPU here.")
    else:
        sentences.append("torch sees no GPU here, and the CUDA kernels are not needed.")
    by = (
        f"the compiled CPU kernels ({cpu_native.level()})"
        if cpu_native.cpu_status().available
        else "oneDNN through torch, slower than with the compiled CPU kernels"
    )
    sentences.append(f"models on the CPU run on {by}, with the same numbers as everywhere.")
    return sentences


def render(document: Document) -> Table:
    cuda, extension, chip = document["cuda"], document["extension"], document["cpu"]
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("package", f"{document['package'] or 'not installed'} ({document['location']})")
    table.add_row("Python", f"{document['python']} on {document['platform']}")
    built = f"CUDA {cuda['torch_built_with']}" if cuda["torch_built_with"] else "no CUDA"
    table.add_row("torch", f"{document['torch']}, built with {built}")
    others = (f"{k} {v or '(not installed)'}" for k, v in document["packages"].items())
    table.add_row("with", ", ".join(others))
    for index, gpu in enumerate(cuda["devices"]):
        memory = gpu["memory_bytes"] / 2**30
        table.add_row(
            f"GPU {index}",
            f"{gpu['name']}, compute capability {gpu['capability']}, {memory:.0f} GiB",
        )
    if not cuda["devices"]:
        table.add_row("GPU", "none that torch can use")
    state = "loaded" if extension["available"] else f"not in use: {extension['reason']}"
    table.add_row("CUDA library", state)
    if extension["archs"]:
        table.add_row(
            "",
            f"built for {' '.join(extension['archs'])} with CUDA {extension['cuda_version']}, "
            f"CUTLASS {extension['cutlass_version']}, for torch {extension['torch_target']} "
            "or newer",
        )
    if extension["available"]:
        table.add_row("SQK_TUNE_CACHE", escape(extension["tune_cache"]))
        if cuda["devices"] and not extension["tuned"]:
            # No table of csrc/gemm has been tuned on a GPU yet (docs/guides/gpu.md, "Retuning").
            table.add_row("", "no tuned table exists for this GPU: tiles are chosen by estimates")
        if extension["not_described"]:
            table.add_row("", escape(f"its tables cannot be shown: {extension['not_described']}"))
    if extension["tuning"]:
        table.add_row("", "a tuning build: with candidates, for benchmarks.tuner")
    for op, rows in extension["tables"].items():
        for index, row in enumerate(rows):
            text = escape(f"{row['path']}: {row['when']}")  # "[m]" is not markup
            table.add_row(f"{op} by" if index == 0 else "", text)
    table.add_row("CPU", f"{chip['name']}; torch uses {chip['torch_capability']}")
    table.add_row("", f"features: {', '.join(chip['features']) or 'none known'}")
    table.add_row("", f"{chip['threads']} threads")
    compiled = chip["library"]
    state = "loaded" if compiled["available"] else f"not in use: {escape(compiled['reason'])}"
    table.add_row("CPU library", state)
    if compiled["levels"]:
        table.add_row(
            "",
            f"built for {' '.join(compiled['levels'])} with {compiled['compiler']}, for torch "
            f"{compiled['torch_target']} or newer",
        )
    if compiled["usable_levels"]:
        table.add_row("", f"this processor runs {' '.join(compiled['usable_levels'])}")
    table.add_row("int8 on the CPU", f"{chip['int8']}: {chip['int8_meaning']}")
    for index, sentence in enumerate(document["verdict"]):
        table.add_row("so" if index == 0 else "", sentence)
    return table
