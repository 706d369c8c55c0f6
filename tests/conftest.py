"""Fixtures that several folders share: no network, tiny random models, and one small real model."""

from __future__ import annotations

import os

# huggingface_hub reads these once, at its import. No test may need the network.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

if TYPE_CHECKING:
    from tests.support import mutants

pytest_plugins = [
    "tests.support.share",
    "tests.support.what_ran",
    "tools.ptxsim.notice",
    "pytester",
]  # pytester: for tests/test_what_ran.py


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--backend",
        choices=("cpu", "levels", "onednn", "simulator", "cuda"),
        default="cpu",
        help="where tests/kernels runs the ops (default: cpu)",
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sends the real model's tests to one pytest-xdist worker, which then loads it once, and starts them first."""
    for item in items:
        if "smollm2" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.xdist_group("smollm2"))
    items.sort(key=lambda item: item.get_closest_marker("real_model") is None)


@pytest.fixture(scope="session")
def smollm2() -> tuple[Any, Any]:
    """(model, tokenizer) of SmolLM2-135M-Instruct in float32. Tests share it: change only a deep copy."""
    from smoothquant_kernels.errors import SmoothQuantError
    from smoothquant_kernels.evaluation.models import builtin_demo_model, load_model, load_tokenizer

    try:
        path = builtin_demo_model()
    except SmoothQuantError as error:
        pytest.skip(str(error))
    pytest.importorskip("gguf", reason="the real model is a GGUF file: pip install gguf")
    return load_model(path), load_tokenizer(path)


@pytest.fixture
def tiny_llama() -> Callable[..., Any]:
    """Makes a LLaMA of some ten thousand random weights; keyword arguments go to its config."""

    def make(*, seed: int = 0, dtype: torch.dtype = torch.float32, **config: Any) -> Any:
        from transformers import LlamaConfig, LlamaForCausalLM

        sizes = {
            "vocab_size": 96,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 128,
            # Ten times the default, so that the logits differ as much as those of a trained model.
            "initializer_range": 0.2,
            "bos_token_id": 1,
            "eos_token_id": 2,
        }
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model: Any = LlamaForCausalLM(LlamaConfig(**{**sizes, **config}))
        return model.to(dtype).eval()

    return make


@pytest.fixture
def word_tokenizer() -> Callable[..., Any]:
    """Makes a tokenizer of whole words: the i-th word is token i. `bos` starts every text."""

    def make(words: Sequence[str], *, bos: str | None = None) -> Any:
        from tokenizers import Tokenizer, models, pre_tokenizers, processors
        from transformers import PreTrainedTokenizerFast

        vocabulary = {word: i for i, word in enumerate(words)}
        core = Tokenizer(models.WordLevel(vocabulary, unk_token=words[0]))
        core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        if bos is not None:
            core.post_processor = processors.TemplateProcessing(
                single=f"{bos} $A", special_tokens=[(bos, vocabulary[bos])]
            )
        make_tokenizer: Any = PreTrainedTokenizerFast
        return make_tokenizer(tokenizer_object=core, bos_token=bos)

    return make


@pytest.fixture
def packs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Ids of the weights that the kernels on oneDNN packed, in order. The compiled kernels, which pack none, rest."""
    from smoothquant_kernels.backends import onednn
    from tests.support.backends import kernels_in_python

    seen: list[int] = []
    original = onednn._pack

    def counting(w_q: torch.Tensor, *args: Any) -> Any:
        seen.append(id(w_q))
        return original(w_q, *args)

    monkeypatch.setattr(onednn, "_pack", counting)
    with kernels_in_python():
        yield seen


@pytest.fixture(scope="session")
def null_library() -> Path:
    """The kernels' library, linked against an empty CUDA runtime, for `null_runtime.python`."""
    from tests.support import null_runtime

    try:
        return null_runtime.simulator_library()
    except null_runtime.Missing as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def planted_runs(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[mutants.Runs]:
    """The outcome of the tests for each of the module's MUTANTS."""
    from tests.support import mutants

    yield from mutants.run_all(request.module.MUTANTS, request, tmp_path_factory)
