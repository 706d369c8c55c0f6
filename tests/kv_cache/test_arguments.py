"""What `Int8KVCache` takes, what it refuses, and the bytes that it states."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
import transformers as t

from smoothquant_kernels import Int8KVCache, SmoothQuantError, use_int8_attention
from smoothquant_kernels.kv_cache.calibration import KVCalibration, LayerMaxima
from tests.support.models import make_model


def maxima(heads: int = 2, dim: int = 8) -> LayerMaxima:
    values = torch.linspace(1, 3, heads * dim).view(heads, dim)
    return LayerMaxima(q=values.flip(1), k=values, v=2 * values)


CALIBRATION = KVCalibration({0: maxima(), 1: maxima()}, tokens=9)
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "scheme": ({"scheme": "int4"}, "scheme must be 'per_token' or 'static', got 'int4'"),
    "rotation": (
        {"rotation": 12},
        "rotation must be 'auto', 0 or a power of two from 2 to 512, got 12",
    ),
    "rotation_word": (
        {"rotation": "on"},
        "rotation must be 'auto', 0 or a power of two.* got 'on'",
    ),
    "static_rotation": (
        {"scheme": "static", "rotation": 4, "calibration": CALIBRATION},
        "drop rotation=4, or choose scheme='per_token'",
    ),
    "static_alpha": (
        {"scheme": "static", "alpha": 0.5, "calibration": CALIBRATION},
        "drop alpha=0.5, or choose scheme='per_token'",
    ),
    "static_alone": (
        {"scheme": "static"},
        "scheme='static' needs a calibration, and the model has none",
    ),
    "alpha_alone": ({"alpha": 0.5}, "alpha=0.5 needs a calibration, and the model has none"),
    "alpha": ({"alpha": 1.5, "calibration": CALIBRATION}, "alpha must be from 0 to 1, got 1.5"),
    "alpha_word": ({"alpha": "0.5", "calibration": CALIBRATION}, "from 0 to 1, got '0.5'"),
    "size": ({"max_cache_len": 0}, "max_cache_len must be at least 1, got 0"),
    "size_word": ({"max_cache_len": "64"}, "max_cache_len must be at least 1, got '64'"),
    "size_fraction": ({"max_cache_len": 64.5}, "got 64.5; give a whole number of tokens"),
    "size_flag": ({"max_cache_len": True}, "got True; give a whole number of tokens"),
    "calibration": (
        {"scheme": "static", "calibration": {0: maxima()}},
        "calibration must be what calibrate_kv_cache returns, got dict",
    ),
    "layer": (
        {"alpha": 0.5, "calibration": KVCalibration({0: maxima()}, 9)},
        r"the calibration has the layers \[0\], but not layer 1",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments(case: str) -> None:
    arguments, sentence = WRONG[case]
    with pytest.raises(SmoothQuantError, match=sentence):
        Int8KVCache(make_model("llama_gqa"), **arguments)


def test_wrong_models() -> None:
    with pytest.raises(
        SmoothQuantError, match="needs a model of transformers or its configuration, got Linear"
    ):
        Int8KVCache(torch.nn.Linear(2, 2))
    config = t.LlamaConfig(num_hidden_layers=2, layer_types=["full_attention", "full_attention"])
    config.layer_types = ["full_attention", "indexed_attention"]
    with pytest.raises(
        SmoothQuantError, match="layer 1 is of type 'indexed_attention', which has no int8 cache"
    ):
        Int8KVCache(config)


def first_tokens(heads: int, dim: int, **arguments: Any) -> Int8KVCache:
    cache = Int8KVCache(make_model("llama_gqa"), **arguments)
    k = torch.ones(1, heads, 3, dim)
    cache.update(k, k, 0)
    return cache


def test_what_only_the_first_tokens_tell() -> None:
    with pytest.raises(SmoothQuantError, match="layer 0 caches heads of 257 channels, at most 256"):
        first_tokens(2, 257)
    with pytest.raises(
        SmoothQuantError, match="rotation 16 does not divide the 24 channels of a head in layer 0"
    ):
        first_tokens(2, 24, rotation=16)
    with pytest.raises(
        SmoothQuantError, match=r"has \[2, 8\] factors \(heads, channels\) of keys for layer 0"
    ):
        first_tokens(4, 8, scheme="static", calibration=CALIBRATION)


@pytest.mark.parametrize(("dim", "rotation"), [(8, 8), (24, 8), (7, 0), (256, 256), (96, 32)])
def test_auto_rotation(dim: int, rotation: int) -> None:
    assert first_tokens(2, dim).rotation == rotation
    assert first_tokens(2, dim, rotation=0).rotation == 0


@pytest.mark.parametrize(
    ("dim", "static", "per_head"),
    [(128, False, 264), (128, True, 256), (64, False, 136), (80, False, 168), (20, False, 72)],
)
def test_bytes(dim: int, static: bool, per_head: int) -> None:
    """D + 4 for a key and for a value of one head, where D counts up to a multiple of 16; D with static scales."""
    arguments: dict[str, Any] = {}
    if static:
        arguments = {
            "scheme": "static",
            "calibration": KVCalibration({n: maxima(2, dim) for n in (0, 1)}, 1),
        }
    cache = first_tokens(2, dim, **arguments)
    assert cache.scheme == ("static" if static else "per_token")
    assert cache.bytes_per_token == 2 * per_head  # heads, of the one layer that has tokens
    assert cache.nbytes == 64 * 2 * per_head


def test_memory_of_4096_tokens() -> None:
    """At most 53 % of float16, measured, also one token after the buffers grew."""
    config = t.LlamaConfig(hidden_size=256, num_attention_heads=2, num_hidden_layers=2)
    k = torch.randn(1, 2, 4096, 128)
    cache, twin = Int8KVCache(config), t.DynamicCache(config=config)
    for layer in range(2):
        cache.update(k, k, layer)
        twin.update(k.half(), k.half(), layer)
    half = sum(layer.keys.nbytes + layer.values.nbytes for layer in twin.layers)
    assert cache.nbytes / half == 264 / 512
    for layer in range(2):
        cache.update(k[:, :, :1], k[:, :, :1], layer)
    assert cache.nbytes / (half * 4097 / 4096) <= 0.53


@pytest.mark.parametrize("arguments", [{}, {"max_cache_len": 32}])
def test_100_generations_do_not_grow(arguments: dict[str, Any]) -> None:
    model = use_int8_attention(make_model("mistral"))
    cache = Int8KVCache(model, **arguments)
    ids = torch.arange(20)[None]
    sizes, texts = set(), set()
    for _ in range(100):
        y = model.generate(ids, cache=cache, max_new_tokens=2, do_sample=False, pad_token_id=0)
        sizes.add(cache.nbytes)
        texts.add(tuple(y[0].tolist()))
        cache.reset()
    assert len(sizes) == len(texts) == 1


@pytest.mark.parametrize("scheme", ["static", "per_token"])
@pytest.mark.parametrize("arguments", [{}, {"max_cache_len": 40}])
def test_calibrated_caches(scheme: str, arguments: dict[str, Any]) -> None:
    """Kernel and float copies agree under factors, and the model's own calibration is found."""
    model = make_model("llama_gqa")
    model.smoothquant_kv_calibration = KVCalibration(  # type: ignore[assignment]
        {
            n: LayerMaxima(*(torch.full((2, 8), 4.0) + torch.arange(8) for _ in range(3)))
            for n in (0, 1)
        },
        1,
    )
    options = {"scheme": scheme, "alpha": None if scheme == "static" else 0.5, **arguments}
    logits = []
    for name in ("sdpa", "int8_kv"):
        use_int8_attention(model).set_attn_implementation(name)
        cache = Int8KVCache(model, **options)
        with torch.no_grad():
            model(torch.arange(9)[None], cache=cache)
            logits.append(model(torch.tensor([[3]]), cache=cache).logits)
        layer = cache.int8_layers[0]
        assert layer.quantizer.k_smooth is not None
        assert (layer.buffers.k_scale is None) == (scheme == "static")
    error = (logits[0] - logits[1]).abs().max() / logits[0].abs().max()
    assert 0 < error < 0.05  # two layers with queries in int8


OLD = """
import transformers
transformers.__version__ = "5.23.0"
import smoothquant_kernels
try:
    smoothquant_kernels.Int8KVCache
except smoothquant_kernels.SmoothQuantError as error:
    print(error)
smoothquant_kernels.register_transformers()
"""


def test_an_older_transformers() -> None:
    done = subprocess.run([sys.executable, "-c", OLD], capture_output=True, text=True, timeout=120)
    assert "Int8KVCache needs transformers >= 5.24" in done.stdout, done.stderr
    assert not done.returncode, done.stderr
