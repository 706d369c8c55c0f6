"""Runs commands in this process and keeps what they print. Also a tokenizer of twenty words."""

from __future__ import annotations

import json
from typing import Any

from typer.testing import CliRunner

from smoothquant_kernels.cli.app import app

WORDS = "the a cat dog sat ran on under mat tree and then slept while it rained all day".split()
TEXT = " ".join(WORDS[(i * i + i // 7) % len(WORDS)] for i in range(1500))
QUANTIZE = ("--calibration-tokens", "200", "--device", "cpu")


class Result:
    """The exit code and both output streams of a command."""

    def __init__(self, *arguments: object) -> None:
        result = CliRunner().invoke(app, [str(a) for a in arguments], prog_name="sqk")
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exc_info
        self.code, self.out, self.err = result.exit_code, result.stdout, result.stderr

    @property
    def json(self) -> Any:
        assert self.code == 0, self.err
        return json.loads(self.out)


def refused(*arguments: object) -> str:
    """The error sentence of a command that must fail because of a user's mistake."""
    result = Result(*arguments)
    assert result.code == 2, (result.code, result.out, result.err)
    assert result.out == ""
    assert "Traceback" not in result.err
    lines = [line for line in result.err.splitlines() if line.startswith("Error: ")]
    assert len(lines) == 1 and result.err.splitlines()[-1] == lines[0], result.err
    return lines[0].removeprefix("Error: ")


VOCABULARY = {word: i for i, word in enumerate(["<unk>", "<s>", "</s>", *WORDS])}


def word_tokenizer(*, encoder: bool = False) -> Any:
    """A tokenizer of whole words. `encoder` adds <s> before and </s> after each text, as BERT does."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel(VOCABULARY, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    if encoder:
        words.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
        )
    make: Any = PreTrainedTokenizerFast
    return make(tokenizer_object=words, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
