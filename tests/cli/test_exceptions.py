"""Messages for exceptions from elsewhere: from a model's code, from libraries and from the system."""

from __future__ import annotations

import errno
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from smoothquant_kernels.cli import quantize
from tests.support.command_line import QUANTIZE, VOCABULARY, Result, refused


@pytest.fixture
def command(tiny: Path, text: Path, tmp_path: Path) -> tuple[Any, ...]:
    return ("quantize", tiny, "-o", tmp_path / "q", "--calibration", text, *QUANTIZE)


ERRORS = [
    RuntimeError("The size of tensor a (4) must match"),
    KeyError("rope"),
    ZeroDivisionError("division by zero"),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("more", [(), ("--stream",), ("--search", "--calibration-tokens", "1536")])
def test_an_exception_in_a_model_becomes_one_sentence(
    command: tuple[Any, ...], tmp_path: Path, error: Exception, more: Any, monkeypatch: Any
) -> None:
    from transformers.models.llama import modeling_llama

    def forward(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(modeling_llama.LlamaRotaryEmbedding, "forward", forward)
    result = Result(*command, *more)
    assert result.code in (1, 2) and result.out == "" and "Traceback" not in result.err
    said = result.err.splitlines()[-1]
    assert said.startswith("Error: ") and type(error).__name__ in said and str(error) in said
    assert not (tmp_path / "q").exists()
    if result.code == 1:
        assert "test_exceptions.py, line " in said and said.endswith("shows the traceback.")
        shown = Result(*command, *more, "--verbose").err
        assert "Traceback (most recent call last)" in shown and shown.splitlines()[-1] == said


def test_a_bug_in_this_package_shows_its_traceback(command: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(quantize, "check_output", None)
    with pytest.raises(AssertionError, match="'NoneType' object is not callable"):
        Result(*command)  # fails the test helper, which accepts only error sentences


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), "out of memory (CUDA out of memory.): "),
        (MemoryError(), "out of memory (MemoryError): free some"),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:127] can't allocate memory: you tried"),
            "quantize with --stream",
        ),
        (OSError(errno.ENOSPC, "No space left on device", "q/x"), "q/x: No space left on device; "),
        (OSError(errno.EIO, "Input/output error"), "the output: Input/output error; "),
    ],
)
def test_lack_of_memory_or_disk_is_explained(
    command: Any, error: Exception, words: str, monkeypatch: Any
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(quantize, "quantize_model", fails)
    assert words in refused(*command)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
@pytest.mark.parametrize("more", [(), ("--json",)])
def test_a_full_output_device_is_reported(more: tuple[str, ...]) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "smoothquant_kernels", "doctor", *more],
            stdout=full, stderr=subprocess.PIPE, text=True, timeout=120, check=False,
        )  # fmt: skip
    assert done.returncode != 0 and "Traceback" not in done.stderr
    assert "Error: the output: No space left on device" in done.stderr


@pytest.mark.parametrize(
    ("options", "got"),
    [
        (("--alpha", "half"), "; got 'half'"),
        (("--calibration-tokens", "1e3"), "; got '1e3'"),
        (("--alpha=half",), "Invalid value for '--alpha'"),
    ],
)
def test_a_value_that_is_not_a_number_is_quoted(command: Any, options: Any, got: str) -> None:
    result = Result(*command, *options)
    said = " ".join(result.err.replace("│", " ").split())
    assert result.code == 2 and result.out == "" and got in said and "Traceback" not in said


@pytest.mark.parametrize(
    "arguments", [("evaluate", "--text", "TEXT"), ("generate", "-p", "the cat")]
)
def test_a_tokenizer_of_another_model_is_refused(
    tiny: Path, text: Path, tmp_path: Path, arguments: Any
) -> None:
    folder = shutil.copytree(tiny, tmp_path / "other")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    words = tokenizer["model"]["vocab"]
    tokenizer["model"]["vocab"] = {w: i + 1000 * (w in "the a cat") for w, i in words.items()}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    options = [text if a == "TEXT" else a for a in arguments[1:]]
    said = refused(arguments[0], folder, *options)
    assert said.startswith("The tokenizer makes token 10") and "has only 21 tokens" in said
    for stream in ((), ("--stream",)):
        command = ("quantize", folder, "-o", tmp_path / "q", "--calibration", text, *stream)
        assert "the tokenizer belongs to another model" in refused(*command)


def test_a_config_of_another_model_is_refused(tiny: Path, command: Any, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny, tmp_path / "other")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 48}))
    said = refused(command[0], folder, *command[2:])
    if transformers.__version__.startswith("4."):  # its message has no shapes
        assert f"_proj.weight has another shape in {folder} than config.json asks for: give" in said
    else:
        assert (
            "_proj.weight has shape [" in said and f"in {folder} and config.json asks for [" in said
        )
    assert "ignore_mismatched_sizes" not in said


def test_a_report_needs_the_checkpoints_own_model(tiny: Path, command: Any, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from transformers import MistralConfig, MistralForCausalLM

    other = shutil.copytree(tiny, tmp_path / "other")
    (other / "model.safetensors").unlink()
    config = MistralConfig(
        vocab_size=len(VOCABULARY), hidden_size=32, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=4,
    )  # fmt: skip
    MistralForCausalLM(config).save_pretrained(other)
    assert Result(*command).code == 0
    said = refused(
        "report", tmp_path / "q", "--reference", other, "-o", tmp_path / "r", *command[4:]
    )
    assert said.endswith("a MistralForCausalLM: give --reference the model that it was made from.")
