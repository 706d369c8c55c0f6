"""A cache of a fixed size under torch.compile: one graph for all steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as t

from smoothquant_kernels import Int8KVCache, use_int8_attention
from tests.support.models import GQA, VOCAB, make_model


def decode(model: Any, forward: Any, cache: Int8KVCache, steps: int = 14) -> torch.Tensor:
    """Greedy logits [steps, B, vocabulary] after a prompt, with the masks that `generate` makes."""
    ids = torch.randint(3, VOCAB, (2, 5), generator=torch.Generator().manual_seed(3))
    logits = []
    with torch.no_grad():
        logits.append(model(ids, cache=cache).logits[:, -1])
        for _ in range(steps):
            token = logits[-1].argmax(-1)[:, None]
            inputs = model.prepare_inputs_for_generation(
                token,
                cache=cache,
                attention_mask=None,
                next_sequence_length=1,
                is_first_iteration=False,
            )
            logits.append(forward(**inputs).logits[:, -1])
    return torch.stack(logits)


def sliding() -> Any:
    torch.manual_seed(0)
    return t.MistralForCausalLM(t.MistralConfig(**GQA, sliding_window=8)).eval()


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("family", ["full", "sliding"])
def test_decoding_is_one_graph(family: str, backend: str) -> None:
    model = use_int8_attention(make_model("llama_gqa") if family == "full" else sliding())
    expected = decode(model, model, Int8KVCache(model, max_cache_len=32))
    torch._dynamo.reset()
    graphs = []

    def compiler(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        if backend == "eager":
            return graph.forward
        from torch._dynamo.backends.debugging import aot_eager

        return aot_eager(graph, inputs)

    compiled = torch.compile(model.forward, backend=compiler, fullgraph=True)
    cache = Int8KVCache(model, max_cache_len=32)
    y = decode(model, compiled, cache)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    assert any("decode_attention_s8" in str(n.target) for n in graphs[-1].graph.nodes)
    if family == "full":
        assert len(graphs) == 1
    cache.reset()
    torch.testing.assert_close(decode(model, compiled, cache), expected, rtol=1e-5, atol=1e-5)


def test_generate_compiles_by_its_own_rules() -> None:
    """`generate` compiles with a cache that `is_compileable`; on a CPU only where it is told to."""
    model = use_int8_attention(make_model("llama_gqa"))
    ids = torch.arange(12).view(2, 6)
    config = t.CompileConfig(backend="eager", fullgraph=True, dynamic=False)
    config._compile_all_devices = True
    texts = []
    for options in ({"disable_compile": True}, {"compile_config": config}):
        cache = Int8KVCache(model, max_cache_len=24)
        texts.append(
            model.generate(
                ids,
                cache=cache,
                max_new_tokens=9,
                do_sample=False,
                pad_token_id=0,
                eos_token_id=None,
                **options,
            )
        )
    assert torch.equal(*texts)
    assert hasattr(model, "_compiled_call")
    assert not Int8KVCache(model).is_compileable


@pytest.mark.slow
def test_a_compiled_prompt() -> None:
    """Nobody has seen whether this model can read int8, so the compiled prompt and its steps read floats."""
    torch._dynamo.reset()
    model = use_int8_attention(make_model("llama_gqa"))
    compiled = torch.compile(model.forward, backend="eager")
    cache = Int8KVCache(model, max_cache_len=32)
    cache.early_initialization(2, 2, 8, torch.float32, torch.device("cpu"))
    ids = torch.arange(12).view(2, 6)
    with torch.no_grad():
        expected = model(ids).logits
        torch.testing.assert_close(
            compiled(ids, cache=cache).logits, expected, rtol=1e-4, atol=1e-4
        )
        assert [layer.direct for layer in cache.int8_layers] == [None, None]
        assert compiled(ids[:, :1], cache=cache).logits.isfinite().all()
    assert int(cache.get_seq_length()) == 7
