"""SmolLM2 in vLLM: the perplexity of our modules, and the server."""

from __future__ import annotations

import copy
import math
import os
import runpy
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("vllm")

from smoothquant_kernels import (
    SmoothQuantConfig,
    load_quantized,
    save_quantized,
    smooth_and_quantize,
)
from smoothquant_kernels.evaluation.text import token_windows, topics
from tools.build.plan import ROOT

pytestmark = [pytest.mark.real_model, pytest.mark.slow, pytest.mark.compiler]
WINDOW, TOKENS = 512, 3072
#: A folder in the compressed-tensors format, as this package exports it; without it, that test is skipped.
COMPRESSED = os.environ.get("SMOOTHQUANT_KERNELS_COMPRESSED_TENSORS", "")
STARTS = 900  # seconds that the server may take; a quiet machine needs one minute


@pytest.fixture(scope="module")
def native(smollm2: tuple[Any, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    model, tokenizer = copy.deepcopy(smollm2[0]), smollm2[1]
    windows = token_windows(topics("calibration"), tokenizer, window=WINDOW, max_tokens=4096)
    config = SmoothQuantConfig(calibration_tokens=4096)
    data = [window.input_ids for window in windows]
    int8 = smooth_and_quantize(model, data, config, progress=False)
    return save_quantized(int8, tmp_path_factory.mktemp("smollm2") / "int8", tokenizer=tokenizer)


@pytest.mark.parametrize(
    "source",
    [
        "native",
        pytest.param(
            COMPRESSED, marks=pytest.mark.skipif(not COMPRESSED, reason="no folder is given")
        ),
    ],
    ids=["native", "compressed-tensors"],
)
def test_perplexity(
    source: str,
    native: Path,
    log_probs: Callable[..., list[Tensor]],
    smollm2: tuple[Any, Any],
) -> None:
    folder = native if source == "native" else Path(source)
    model, ours, scored = load_quantized(folder), [], []
    windows = token_windows(topics("evaluation"), smollm2[1], window=WINDOW, max_tokens=TOKENS)
    prompts = [window.input_ids.flatten().tolist() for window in windows]
    answers = log_probs(folder, *prompts, max_model_len=2 * WINDOW)
    for ids, window, answer in zip(prompts, windows, answers, strict=True):
        with torch.no_grad():
            p = model(input_ids=torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        ours.append(p.gather(1, torch.tensor(ids[1:])[:, None])[-window.scored :, 0])
        scored.append(answer[-window.scored :, 0])
    mine, theirs = torch.cat(ours).double(), torch.cat(scored).double()
    assert mine.numel() == TOKENS - 1
    # Measured: 15.737 and 15.736. Flipped codes move single tokens by 0.05, so the mean's standard error is 0.0009.
    assert abs(math.expm1(float((mine - theirs).mean()))) < 1e-3


@pytest.fixture(scope="module")
def server(native: Path) -> Iterator[str]:
    """The address of vLLM's server with the folder, as a user starts it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(native)]
    command += ["--dtype", "float32", "--enforce-eager", "--gpu-memory-utilization", "0.15"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", "int8"]
    command += ["--max-model-len", "512"]
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    running = subprocess.Popen(command, env=environment)
    try:
        end = time.monotonic() + STARTS
        while time.monotonic() < end and running.poll() is None:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(1)
        else:
            pytest.fail(f"the server did not start: {running.poll()}")
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        running.terminate()
        running.wait(60)


def test_the_server_answers_an_openai_client(
    server: str, native: Path, smollm2: tuple[Any, Any]
) -> None:
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=server, api_key="none")
    prompt = "The capital of France is"
    answer = client.completions.create(
        model="int8", prompt=prompt, max_tokens=8, temperature=0, logprobs=3
    ).choices[0]
    tokenizer, model = smollm2[1], load_quantized(native)
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    for token, said in zip(answer.logprobs.tokens, answer.logprobs.token_logprobs, strict=True):
        with torch.no_grad():
            p = model(input_ids=ids).logits[0, -1].log_softmax(-1)
        best = int(p.argmax())
        assert tokenizer.decode([best]) == token
        # A flipped code moves the logarithm of one token's probability by about 0.05 (test_perplexity).
        assert abs(float(p[best]) - said) < 0.25
        ids = torch.cat([ids, torch.tensor([[best]])], 1)


def test_example(native: Path, capfd: pytest.CaptureFixture[str]) -> None:
    main = runpy.run_path(str(ROOT / "examples" / "serve_with_vllm.py"))["main"]
    main(str(native), "The capital of France is")
    assert "The capital of France is Paris" in capfd.readouterr().out
