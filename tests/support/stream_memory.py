"""Quantizes a checkpoint under a memory limit: `python stream_memory.py stream|memory SOURCE TARGET MEGABYTES`.

The limit applies to what the process allocates beyond Python and torch themselves. `make` writes the checkpoint.
"""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file

from smoothquant_kernels import save_quantized, smooth_and_quantize
from smoothquant_kernels.evaluation.models import load_model
from smoothquant_kernels.streaming.stream import quantize_streamed


def make(folder: Path, layers: int, hidden: int, ffn: int, dtype: str = "float32") -> float:
    """Writes a random LLaMA, one shard a layer, without holding all of it in memory. Returns its bytes."""
    config = transformers.LlamaConfig(
        vocab_size=256,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 128,
        architectures=["LlamaForCausalLM"],
        dtype=dtype,
    )
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {k: v.shape for k, v in transformers.LlamaForCausalLM(config).state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    files: dict[str, list[str]] = {}
    for name in shapes:
        number = int(name.split(".")[2]) + 1 if ".layers." in name else 0
        files.setdefault(f"model-{number:05}.safetensors", []).append(name)
    for file, names in files.items():
        tensors = {
            n: 1 + 0.1 * torch.randn(shapes[n], generator=generator)
            if "norm" in n
            else 0.05 * torch.randn(shapes[n], generator=generator)
            for n in names
        }
        save_file({n: t.to(getattr(torch, dtype)) for n, t in tensors.items()}, folder / file)
    weight_map = {n: file for file, names in files.items() for n in names}
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return float(sum(f.stat().st_size for f in folder.glob("*.safetensors")))


def status(key: str) -> int:
    """A value of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def main(mode: str, source: str, target: str, megabytes: str) -> None:
    torch.set_num_threads(1)
    data = [torch.arange(128)[None] * 7 % 256]
    # Quantizes a small model first, so that the limit does not count what is imported at the first use.
    small = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=32,
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
        )
    )
    save_quantized(smooth_and_quantize(small, [torch.arange(8)], progress=False), f"{target}-warm")
    limit = status("VmData") + int(megabytes) * 1_000_000
    before = status("VmRSS")
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    try:
        torch.zeros(2 * int(megabytes) * 1_000_000, dtype=torch.uint8)
        print("unlimited")
        return
    except RuntimeError:
        pass
    before_peak = max(status("VmHWM"), before)
    if mode == "stream":
        quantize_streamed(source, target, data, progress=False)
    else:
        model = load_model(source)
        save_quantized(smooth_and_quantize(model, data, progress=False), target)
    print(json.dumps({"peak_mb": (status("VmHWM") - before) / 1e6, "before_mb": before_peak / 1e6}))


if __name__ == "__main__":
    if sys.argv[1] == "make":
        print(make(Path(sys.argv[2]), *map(int, sys.argv[3:6]), *sys.argv[6:]))
    else:
        main(*sys.argv[1:5])
