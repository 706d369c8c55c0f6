"""`torch.compile(fullgraph=True)` of whole quantized models, also with dynamic shapes and a static cache."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from smoothquant_kernels.schemes import ACTIVATION_SCHEMES
from tests.nn.test_generate import FAMILIES, NEAR, model
from tests.support.models import VOCAB, logits

SLOTS = 16


def ids(length: int, rows: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(length)
    return torch.randint(3, VOCAB, (rows, length), generator=generator)


def compiled(made: Any, backend: Any, **options: Any) -> Any:
    torch._dynamo.reset()
    return torch.compile(made, fullgraph=True, backend=backend, **options)


@pytest.mark.parametrize("backend", ["eager", pytest.param("aot_eager", marks=pytest.mark.slow)])
@pytest.mark.parametrize("family", FAMILIES)
def test_one_graph_serves_all_lengths(family: str, backend: str) -> None:
    """With aot_eager two graphs do, as for the float models of transformers."""
    made = model(family, "per_token")
    counter = CompileCounterWithBackend(backend)
    graph = compiled(made, counter, dynamic=True)
    for length, rows in ((9, 2), (5, 3), (13, 4)):
        assert torch.equal(logits(graph, ids(length, rows)), logits(made, ids(length, rows)))
    assert counter.frame_count == (1 if backend == "eager" else 2)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ACTIVATION_SCHEMES)
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_the_schemes_with_one_shape(backend: str, scheme: str) -> None:
    made = model("llama", scheme)
    graph = compiled(made, backend, dynamic=False)
    assert torch.equal(logits(graph, ids(9)), logits(made, ids(9)))


def require_tensor_lengths() -> None:
    """Skips a test where transformers reads the length of a static cache on the host, unless `generate` runs."""
    if int(transformers.__version__.split(".")[0]) < 5:
        pytest.skip("transformers 4 reads the length of a static cache on the host")


def decode(step: Any, made: Any, count: int = 4) -> list[Tensor]:
    """The logits of a prompt and of `count` steps after it, by `step` on a static cache."""
    require_tensor_lengths()
    cache = transformers.StaticCache(config=made.config, max_cache_len=SLOTS)
    prompt = ids(7)
    with torch.no_grad():
        found = [made(prompt, past_key_values=cache).logits[:, -1:]]
        for i in range(count):
            place = torch.full((2, 1), 7 + i)
            token = found[-1].argmax(-1)
            found.append(step(token, position_ids=place, past_key_values=cache).logits)
    return found


def assert_near(found: list[Tensor], right: list[Tensor], scheme: str) -> None:
    for a, b in zip(found, right, strict=True):
        assert float((a - b).abs().max()) <= NEAR[scheme] * float(b.abs().max())


@pytest.mark.parametrize(
    ("family", "scheme"),
    [("llama", "per_token"), ("qwen2", "static")]
    + [
        pytest.param(family, scheme, marks=pytest.mark.slow)
        for family in FAMILIES
        for scheme in ACTIVATION_SCHEMES
        if (family, scheme) not in (("llama", "per_token"), ("qwen2", "static"))
    ],
)
def test_decoding_with_a_static_cache_is_one_graph(family: str, scheme: str) -> None:
    made = model(family, scheme)
    right = decode(made, made)
    counter = CompileCounterWithBackend("eager")
    found = decode(compiled(made, counter), made)
    assert counter.frame_count == 1
    if family == "qwen2":
        # Grouped queries: transformers adds in another order under the compiler (`sdpa_attention_forward`).
        assert_near(found, right, scheme)
    else:
        assert all(map(torch.equal, found, right))


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
@pytest.mark.slow
@pytest.mark.compiler
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_inductor(family: str) -> None:
    made = model(family, "per_token")
    right, found = decode(made, made), decode(compiled(made, "inductor"), made)
    assert_near(found, right, "per_token")  # inductor adds in another order
