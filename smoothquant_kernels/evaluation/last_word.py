"""Accuracy on the last word of passages, as in LAMBADA."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from smoothquant_kernels.errors import SmoothQuantError
from smoothquant_kernels.evaluation.scoring import _bar, _check_fits, _fitting_window, _logits
from smoothquant_kernels.evaluation.text import Window, front_tokens, load_text, token_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# The last words of LAMBADA are bare. So a word here is letters and digits, joined inside by apostrophes or hyphens. A
# space precedes the last word. The punctuation after it (a period, a bracket) is not scored.
_WORD = re.compile(r"[^\W_]+(?:['\u2019-][^\W_]+)*")
_LAST_WORD = re.compile(rf"(?s)(.*\S) ({_WORD.pattern})[^\w\s]*")
_MIN_WORDS = 20


def last_word_accuracy(
    model: nn.Module,
    text: str | Path | Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    window: int | None = None,
    min_words: int = _MIN_WORDS,
    max_tokens: int | None = None,
    progress: bool = False,
) -> float:
    """The share of passages whose last word the model guesses, with all of its tokens right.

    A passage is a paragraph of at least `min_words` words. Blank lines separate paragraphs, and white space becomes
    single spaces. The model reads each passage without the text before it. A word is a run of letters and digits,
    joined inside by apostrophes or hyphens. A space must precede the last word, and only punctuation may follow it,
    which is dropped. Paragraphs that end otherwise (for example, in code) are left out. The model reads the true text
    up to the word. At each token of the word, its most probable token must be the true one.

    Args:
        model, text, tokenizer: as for `evaluate`.
        window: how many tokens of a passage the model sees, counted from the end. None: as for `evaluate`.
        min_words: how many words a passage has at least, including the last one; 2 or more.
        max_tokens: use the first passages that together have at most this many tokens.
        progress: show a progress bar on stderr.

    Returns:
        A number between 0 and 1.

    Raises:
        SmoothQuantError: there is no such passage, or tokenizer and model do not fit.

    Equivalent to:
        mean(all(model(ids).logits[0, -n - 1 : -1].argmax(-1) == ids[0, -n:]) for ids, n in passages)

    Source: LAMBADA (Paperno et al., 2016), scored as in SmoothQuant (Xiao et al., 2022), section 5.
    """
    if min_words < 2:
        raise SmoothQuantError(f"min_words must be at least 2, not {min_words}.")
    window = _fitting_window(model) if window is None else window
    passages = _passages(load_text(text), tokenizer, window, min_words, max_tokens)
    if not passages:
        raise SmoothQuantError(
            f"No paragraph of the text has {min_words} words, ends in a word and fits max_tokens; "
            "give a longer text of prose."
        )
    _check_fits(model, passages)
    right = 0
    for passage in _bar(passages, "last words", progress):
        logits = _logits(model, passage)
        hit = logits.argmax(-1) == passage.input_ids[0, -passage.scored :].to(logits.device)
        # argmax treats NaN as the greatest value, which could be a hit.
        right += bool((hit & ~logits.isnan().any(-1)).all())
    return right / len(passages)


def _passages(
    texts: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    window: int,
    min_words: int,
    max_tokens: int | None,
) -> list[Window]:
    """Windows that end with the last word of a passage and score its tokens."""
    front = front_tokens(tokenizer)
    passages = []
    total = 0
    for paragraph in re.split(r"\n\s*\n", "\n\n".join(texts)):
        match = _LAST_WORD.fullmatch(" ".join(paragraph.split()))
        if match is None or len(_WORD.findall(match[1])) + 1 < min_words:
            continue
        context = token_ids(match[1], tokenizer)
        whole = token_ids(f"{match[1]} {match[2]}", tokenizer)
        # A tokenizer may merge the word with what precedes it, so scoring starts where the tokens leave the context's.
        known = next(
            (i for i, (a, b) in enumerate(zip(context, whole, strict=False)) if a != b),
            min(len(context), len(whole)),
        )
        asked = len(whole) - known
        ids = front + whole[-(window - len(front)) :] if window > len(front) else []
        if not 0 < asked < len(ids) - len(front):
            continue
        total += len(ids)
        if max_tokens is not None and total > max_tokens:
            break
        passages.append(Window(torch.tensor([ids]), asked))
    return passages
