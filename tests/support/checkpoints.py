"""Tiny quantized models, and comparisons of their checkpoints."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers.quantizers import auto

from smoothquant_kernels import (
    SmoothQuantConfig,
    SmoothQuantError,
    save_quantized,
    smooth_and_quantize,
)
from smoothquant_kernels.checkpoint.manifest import MANIFEST
from smoothquant_kernels.storage.digests import digest
from tests.support import models

WEIGHTS = "smoothquant.safetensors"
IDS = models.token_batches(1)[0]
#: Where transformers finds the classes of a quantization method by its name.
METHOD_MAPPINGS: tuple[dict[str, Any], ...] = (
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING,
    auto.AUTO_QUANTIZER_MAPPING,
)


def llama(**changed: Any) -> nn.Module:
    """With grouped queries, o_proj divides its input at run time, and all other factors are folded."""
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**{**models.GQA, **changed})
    ).eval()


def quantized(make: Callable[[], nn.Module] = llama, scheme: str = "static", **options: Any) -> Any:
    """A new model that is smoothed and quantized."""
    torch.manual_seed(0)
    model = make()
    half = next(model.parameters()).dtype != torch.float32
    options = {"alpha": 0.75, "verify_tolerance": 0.1 if half else 1e-5, **options}
    config = SmoothQuantConfig(activation_scheme=scheme, **options)
    return smooth_and_quantize(model, [IDS], config, progress=False)


def logits(model: nn.Module) -> torch.Tensor:
    return models.logits(model, IDS)


def assert_same_bits(got: torch.Tensor, expected: torch.Tensor) -> None:
    assert (got.dtype, got.shape) == (expected.dtype, expected.shape)
    wrong = (got != expected).nonzero()
    assert bool(expected.isfinite().all())
    first = tuple(wrong[0].tolist()) if len(wrong) else ()
    assert not len(wrong), f"{len(wrong)} differ, first at {first}: {got[first]}, {expected[first]}"


def assert_same_state(got: nn.Module, expected: nn.Module) -> None:
    """The same state dict, the same non-persistent buffers, and the same tied tensors."""
    for group in (
        lambda m: m.state_dict(),
        lambda m: dict(m.named_buffers(remove_duplicate=False)),
    ):
        a, b = group(got), group(expected)
        assert list(a) == list(b)
        for name, value in b.items():
            assert a[name].dtype == value.dtype, name
            assert torch.equal(a[name], value), name
            assert a[name].device.type == "cpu"
    parameters = dict(got.named_parameters(remove_duplicate=False))
    for name, p in expected.named_parameters(remove_duplicate=False):
        others = [n for n, o in expected.named_parameters(remove_duplicate=False) if o is p]
        assert all(parameters[o] is parameters[name] for o in others)


def contents(folder: Path) -> dict[str, str]:
    files = [f for f in folder.rglob("*") if f.is_file()]
    return {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def manifest_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / MANIFEST).read_text())


def rewrite(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Changes the manifest and recomputes its digests, as a forger would."""
    values = manifest_of(folder)
    for name in (WEIGHTS, "config.json"):
        data = (folder / name).read_bytes()
        values["files"][name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    change(values)
    del values["digest"]
    (folder / MANIFEST).write_text(json.dumps({**values, "digest": digest(values)}))


def refusal(call: Callable[[], object]) -> str:
    """The message of the refusal, which must be one line that ends with a full stop."""
    with pytest.raises(SmoothQuantError) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text and text.endswith("."), text
    return text


# --- folders that transformers loads ----------------------------------------------------------------------------------

RELEASE_4 = transformers.__version__.startswith("4.")
#: The functions that write them.
KINDS = ("save_quantized", "save_pretrained")


def write(model: Any, folder: Path, kind: str, limit: int = 10**9) -> Path:
    if kind == "save_quantized":
        return save_quantized(model, folder, max_shard_bytes=limit)
    model.save_pretrained(folder, max_shard_size=limit)
    return folder


def auto(folder: Path, **options: Any) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **options)
