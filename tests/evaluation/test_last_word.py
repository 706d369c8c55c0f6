"""Last-word accuracy, measured on models that have memorized texts."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from smoothquant_kernels.errors import SmoothQuantError
from smoothquant_kernels.evaluation.last_word import last_word_accuracy
from smoothquant_kernels.evaluation.perplexity import evaluate


class Characters:
    """A tokenizer for which each character is a token."""

    def __call__(self, text: str, **_: Any) -> dict[str, Any]:
        return {"input_ids": [ord(c) for c in text]}


class Memory(nn.Module):
    """Continues memorized texts character by character. Predicts "?" for all others."""

    def __init__(self, *texts: str, nan_at_end: bool = False) -> None:
        super().__init__()
        self.texts, self.nan_at_end = texts, nan_at_end

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> SimpleNamespace:
        text = "".join(map(chr, input_ids[0].tolist()))
        logits = torch.zeros(1, len(text), 128)
        for i in range(len(text)):
            known = [t[i + 1] for t in self.texts if t.startswith(text[: i + 1]) and t[i + 1 :]]
            logits[0, i, ord(known[0] if known else "?")] = 1
        if self.nan_at_end:
            logits[0, -2, ord(text[-1])] = math.nan
        return SimpleNamespace(logits=logits)


def accuracy(model: nn.Module, text: str, **options: Any) -> float:
    return last_word_accuracy(model, [text], Characters(), min_words=4, **options)  # type: ignore[arg-type]


def test_every_token_of_the_last_word_must_be_right() -> None:
    text = "one two three fours"
    assert accuracy(Memory(text), text) == 1
    assert accuracy(Memory("one two three fouls"), text) == 0  # one letter in the middle
    assert accuracy(Memory("one two three fourths"), text) == 0
    assert accuracy(Memory(text, nan_at_end=True), text) == 0
    # The words before the last are context and are not scored. The model does not know this context.
    assert accuracy(Memory("ten two three fours"), text) == 0


def test_accuracy_is_the_share_of_correct_passages() -> None:
    known = ["one two three four", "five six seven eight", "nine ten eleven twelve"]
    text = "\n\n".join([*known, "this one it knows not"])
    assert accuracy(Memory(*known), text) == 3 / 4


@pytest.mark.parametrize(
    ("paragraph", "passage"),
    [
        ("one two\n  three   four.", "one two three four"),
        ('He said: "never ever again!"', 'He said: "never ever again'),
        ("this is (as said) well-known", "this is (as said) well-known"),
        ("that is what I don't", "that is what I don't"),
        ("one two three 4th)", "one two three 4th"),
    ],
)
def test_passages_and_their_last_words(paragraph: str, passage: str) -> None:
    assert accuracy(Memory(passage), paragraph) == 1
    assert accuracy(Memory(passage[:-1] + "#"), paragraph) == 0


@pytest.mark.parametrize(
    "paragraph",
    [
        "one two three",  # too short
        "calls x = one two three.four",  # no space before the word
        "see also the \u201cdocs",  # a quotation mark is not a space
        "a b c d f(x) +",  # no word at the end
        "one two three foo_bar",  # an identifier
    ],
)
def test_paragraphs_that_are_not_passages(paragraph: str) -> None:
    with pytest.raises(SmoothQuantError, match="No paragraph of the text has 4 words"):
        accuracy(Memory(), paragraph)
    # Next to a valid passage such a paragraph is ignored.
    text = f"one two three four\n\n{paragraph}"
    assert accuracy(Memory("one two three four"), text) == 1


def test_max_tokens_and_window_bound_the_passages() -> None:
    text = "one two three four\n\nfive six seven eight"  # 18 and 20 characters
    assert accuracy(Memory("one two three four"), text, max_tokens=37) == 1
    assert accuracy(Memory("one two three four"), text, max_tokens=38) == 1 / 2
    with pytest.raises(SmoothQuantError, match="fits max_tokens"):
        accuracy(Memory(), text, max_tokens=17)
    # The model sees only the end of a long passage.
    assert accuracy(Memory("three four"), "one two three four", window=10) == 1
    with pytest.raises(SmoothQuantError, match="min_words must be at least 2"):
        last_word_accuracy(Memory(), [text], Characters(), min_words=1)  # type: ignore[arg-type]


def test_a_bos_token_precedes_the_passage(word_tokenizer: Callable[..., Any]) -> None:
    words = ["<s>", *(f"w{i}" for i in range(30))]
    seen: list[int] = []

    class Count(nn.Module):
        def forward(self, input_ids: torch.Tensor, use_cache: bool) -> SimpleNamespace:
            seen.append(int(input_ids[0, 0]))
            return SimpleNamespace(logits=nn.functional.one_hot(input_ids + 1, 40).float())

    text, tokenizer = [" ".join(words[1:])], word_tokenizer(words, bos="<s>")
    for window in (12, 64):  # cut and whole
        assert last_word_accuracy(Count(), text, tokenizer, window=window) == 1
    result = evaluate(Count(), text, tokenizer, last_word=True)
    assert result.last_word_accuracy == 1 and result.tokens == 30
    assert set(seen) == {0}
