"""vLLM in the process of the tests, on its CPU backend: quick models, and layers that are built without a model."""

from __future__ import annotations

import os

# vLLM reads these at its import.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # several models in one process
os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"  # GiB
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor


@pytest.fixture(scope="session")
def log_probs() -> Callable[..., Tensor]:
    """What vLLM answers for a prompt: [T - 1, V] log-probabilities of all tokens, or [T - 1] of the prompt's own."""

    def ask(
        folder: Path, *prompts: Sequence[int], vocabulary: int = 0, **options: Any
    ) -> list[Tensor]:
        from vllm import LLM, SamplingParams

        options = {"enforce_eager": True, "max_model_len": 128, **options}
        llm = LLM(
            str(folder),
            dtype="float32",
            gpu_memory_utilization=0.05,
            skip_tokenizer_init=True,
            enable_prefix_caching=False,
            max_logprobs=max(vocabulary, 1),
            **options,
        )
        parameters = SamplingParams(
            max_tokens=1, temperature=0, prompt_logprobs=vocabulary, detokenize=False
        )
        answers = []
        for ids in prompts:  # one by one, because per_tensor scales depend on the batch
            [found] = llm.generate([{"prompt_token_ids": ids}], parameters, use_tqdm=False)
            tokens = range(vocabulary) if vocabulary else None
            rows: Any = zip(found.prompt_logprobs[1:], ids[1:], strict=True)
            answers.append(
                torch.tensor([[p[t].logprob for t in tokens or [own]] for p, own in rows])
            )
        return answers

    return ask


@pytest.fixture
def rank(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int, int], None]]:
    """Makes layers that are built after it those of one rank of several. The sum over the ranks is left out."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers import linear, vocab_parallel_embedding

    def choose(index: int, count: int) -> None:
        for module in (linear, vocab_parallel_embedding):
            monkeypatch.setattr(module, "get_tensor_model_parallel_rank", lambda: index)
            monkeypatch.setattr(module, "get_tensor_model_parallel_world_size", lambda: count)

    monkeypatch.setattr(linear, "tensor_model_parallel_all_reduce", lambda y: y)
    with set_current_vllm_config(VllmConfig()):
        choose(0, 1)
        yield choose
