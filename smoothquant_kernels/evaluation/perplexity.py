"""How good a language model is, and how far a quantised one is from the original.

Two perplexities that differ by half a per cent say little: rounding the weights to bfloat16 alone
moves them that much. So a model is compared with its reference token by token: the difference of
their log-likelihoods on the same token (far less noisy than either), the KL divergence of their
distributions, and how often both prefer the same token; each mean with a standard error.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn

from ._batches import position_limit
from .errors import SmoothQuantError
from .text import Window, check_vocabulary, front_tokens, load_text, token_ids, token_windows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["EvaluationResult", "Reference", "evaluate", "last_word_accuracy"]

T = TypeVar("T")

_GIB = 2**30
_WINDOW = 512
# Rows of a [tokens, vocabulary] matrix that are compared at a time. So few keep the temporaries in a
# CPU's cache, which makes the comparison three times as fast as with the whole matrix.
_ROWS = 16

# LAMBADA asks for the last word of a passage, and its words are bare. So here: letters and digits,
# joined inside by apostrophes or hyphens, with a space before; what follows it (a full stop, a
# bracket) is not asked for.
_WORD = re.compile(r"[^\W_]+(?:['\u2019-][^\W_]+)*")
_LAST_WORD = re.compile(rf"(?s)(.*\S) ({_WORD.pattern})[^\w\s]*")
_MIN_WORDS = 20


@dataclass(frozen=True)
class EvaluationResult:
    """What `evaluate` measured; None where it was not asked for, nan where it has no value."""

    tokens: int  # scored
    perplexity: float  # exp(nll)
    nll: float  # mean negative log-likelihood, nats per token
    nll_stderr: float
    mean_kl: float | None  # mean KL(reference || model), nats per token
    kl_stderr: float | None
    top1_agreement: float | None  # share of tokens where both prefer the same token
    delta_nll: float | None  # nll minus that of the reference: positive where the model is worse
    delta_nll_stderr: float | None
    last_word_accuracy: float | None
    seconds: float  # wall time of the whole call

    def to_dict(self) -> dict[str, int | float | None]:
        """Field names and values, for JSON (nan and inf stay floats)."""
        return asdict(self)


class Reference:
    """A model to compare others with, whose answers are remembered.

    Log-probabilities are kept in memory, in float32, as long as they fit: one token takes 4 bytes
    times the vocabulary (4,096 tokens of a vocabulary of 49,152 take 0.75 GiB). Windows beyond that
    run anew each time, so any text can be evaluated; only the time differs. The model must stay as it
    is: do not smooth or quantise it in place, but a copy.

    Args:  model: the reference; max_bytes: bound for the memory, 0 to remember nothing.
    """

    def __init__(self, model: nn.Module, *, max_bytes: int = 2 * _GIB) -> None:
        self.model = model
        self.max_bytes = max_bytes
        self.used_bytes = 0
        self._known: dict[tuple[bytes, int], torch.Tensor] = {}

    def log_probs(self, window: Window) -> torch.Tensor:
        """[scored, vocabulary] float32 log-probabilities, on the CPU if remembered."""
        key = (window.input_ids.cpu().numpy().tobytes(), window.scored)
        if (known := self._known.get(key)) is not None:
            return known
        log_probs = _log_probs(self.model, window)
        if self.used_bytes + log_probs.nbytes <= self.max_bytes:
            self.used_bytes += log_probs.nbytes
            self._known[key] = log_probs.cpu()
        return log_probs


def evaluate(
    model: nn.Module,
    text: str | Path | Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    reference: nn.Module | Reference | None = None,
    window: int | None = None,
    stride: int | None = None,
    max_tokens: int | None = None,
    last_word: bool = False,
    progress: bool = False,
) -> EvaluationResult:
    """Perplexity of a model on a text and, given a reference, its distance from that.

    Each token is scored once (see `token_windows`). Log-probabilities are float32 whatever the
    model's type; means are taken in float64. Logits that are NaN or infinite give a perplexity that
    is nan or inf, no error.

    Standard errors are by batch means: neighbouring tokens share their context, so their values are
    correlated, and the usual s / sqrt(n) is too small. The n tokens, in the order of the text, are
    cut into about sqrt(n) contiguous blocks of about sqrt(n) tokens, and the scatter of the block
    means is taken. Blocks of that length outgrow any fixed correlation length as the text grows,
    and so does their number; the estimate is consistent.

    Args:
        model: a causal language model, original or quantised: `model(input_ids=[1, T]).logits` is
            [1, T, V].
        text: as for `load_text`; pass a text itself in a list.
        tokenizer: turns the text into tokens.
        reference: the model to compare with, same vocabulary. To compare several models with it,
            pass one `Reference(model)` to all calls: it remembers its answers.
        window, stride, max_tokens: see `token_windows`. No window means 512 tokens, or as many as
            the shorter of the models has positions.
        last_word: measure `last_word_accuracy` too, on passages of at most `max_tokens` tokens in
            all.
        progress: show a progress bar on stderr.
    Returns: an `EvaluationResult`.
    Raises: SmoothQuantError if the text is missing or too short, a size is out of range, the window
        is longer than the model's positions, or tokenizer, model and reference do not share a
        vocabulary.
    Equivalent to:
        lp = log_softmax(model(ids).logits[:, :-1].float(), -1)    # per window
        nll = -lp.gather(-1, ids[:, 1:, None]).mean(); perplexity = exp(nll)
        kl = (ref_lp.exp() * (ref_lp - lp)).sum(-1).mean()
    Source: perplexity as in SmoothQuant (Xiao et al., 2022), section 5; batch means: Flegal and
        Jones, "Batch means and spectral variance estimators in Markov chain Monte Carlo" (2010).
    """
    begin = time.perf_counter()
    texts = load_text(text)
    if window is None:
        window = _fitting_window(model, getattr(reference, "model", reference))
    windows = token_windows(texts, tokenizer, window=window, stride=stride, max_tokens=max_tokens)
    if reference is not None and not isinstance(reference, Reference):
        reference = Reference(reference, max_bytes=0)
    for net in [model] if reference is None else [model, reference.model]:
        _check_fits(net, windows)
    scores = [_compare(model, item, reference) for item in _bar(windows, "evaluating", progress)]
    nll, delta, kl, agree = (torch.cat(column) for column in zip(*scores, strict=True))
    compared = reference is not None
    return EvaluationResult(
        tokens=len(nll),
        perplexity=_exp(nll.mean().item()),
        nll=nll.mean().item(),
        nll_stderr=stderr_of_mean(nll),
        mean_kl=kl.mean().item() if compared else None,
        kl_stderr=stderr_of_mean(kl) if compared else None,
        top1_agreement=agree.mean().item() if compared else None,
        delta_nll=delta.mean().item() if compared else None,
        delta_nll_stderr=stderr_of_mean(delta) if compared else None,
        last_word_accuracy=last_word_accuracy(
            model, texts, tokenizer, window=window, max_tokens=max_tokens, progress=progress
        )
        if last_word
        else None,
        seconds=time.perf_counter() - begin,
    )


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
    """Share of passages whose last word the model guesses, all of its tokens right.

    A passage is a paragraph (between blank lines, its white space made single spaces) of at least
    `min_words` words, read with nothing before it. A word is a run of letters and digits, joined
    inside by apostrophes or hyphens; the last word is one that a space precedes and that at most
    punctuation follows, which is dropped. Paragraphs that end otherwise (in code, say) are left
    out. The model is given the true text up to the word, and at each token of the word its most
    probable token must be the true one.

    Args:
        model, text, tokenizer: as for `evaluate`.
        window: tokens of a passage that the model sees, the last ones; None as for `evaluate`.
        min_words: words that a passage has at least, the last one included; 2 or more.
        max_tokens: use passages, from the first on, as long as they have at most so many tokens in
            all.
        progress: show a progress bar on stderr.
    Returns: a number between 0 and 1.
    Raises: SmoothQuantError if there is no such passage, or tokenizer and model do not fit.
    Equivalent to:
        mean(all(model(ids).logits[0, -n - 1 : -1].argmax(-1) == ids[0, -n:]) for ids, n in
        passages)
    Source: LAMBADA (Paperno et al., 2016); as scored in SmoothQuant (Xiao et al., 2022), section 5.
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
        # argmax takes a NaN for the greatest, which could be a hit.
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
        # A tokenizer may join the word with what precedes it: all that the context does not fix is
        # asked for.
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


def _logits(model: nn.Module, window: Window) -> torch.Tensor:
    """[scored, V] logits that predict the last `scored` tokens of the window."""
    with torch.no_grad(), _eval_mode(model):
        output = model(input_ids=window.input_ids.to(_device(model)), use_cache=False)
    logits: torch.Tensor = output.logits
    return logits[0, -window.scored - 1 : -1]


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _log_probs(model: nn.Module, window: Window) -> torch.Tensor:
    return torch.log_softmax(_logits(model, window).float(), dim=-1)


def _compare(
    model: nn.Module, window: Window, reference: Reference | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Per scored token, float64 on the CPU: nll; and, empty without a reference, nll minus that of
    the reference, KL(reference || model), and whether the most probable token is the same (0, 1).
    """
    if reference is not None and reference.model is model:
        log_p = reference.log_probs(window)  # so that it runs once
    else:
        log_p = _log_probs(model, window)
    targets = window.input_ids[0, -window.scored :, None].to(log_p.device)
    nll = -log_p.gather(-1, targets)[:, 0].double().cpu()
    if reference is None:
        nothing = nll.new_empty(0)
        return nll, nothing, nothing, nothing
    log_r = reference.log_probs(window).to(log_p.device)
    if log_r.shape != log_p.shape:
        raise SmoothQuantError(
            f"The model's vocabulary has {log_p.shape[-1]} tokens and the reference's "
            f"{log_r.shape[-1]}; only models of the same vocabulary can be compared."
        )
    delta = nll + log_r.gather(-1, targets)[:, 0].double().cpu()
    pairs = list(zip(log_r.split(_ROWS), log_p.split(_ROWS), strict=True))
    kl = torch.cat([_kl(r, p) for r, p in pairs])
    agree = torch.cat([_agree(r, p) for r, p in pairs])
    return nll, delta, kl.cpu(), agree.cpu()


def _kl(log_r: torch.Tensor, log_p: torch.Tensor) -> torch.Tensor:
    r = log_r.exp()
    # A token that the reference rules out adds nothing (0 log 0 = 0), but 0 * -inf would be NaN.
    terms = torch.where(r == 0, 0.0, r * (log_r - log_p))
    return terms.sum(-1, dtype=torch.float64)


def _agree(log_r: torch.Tensor, log_p: torch.Tensor) -> torch.Tensor:
    # log_softmax spreads one NaN over its row; such a row prefers nothing.
    same = log_r.argmax(-1) == log_p.argmax(-1)
    return (same & ~log_r[:, 0].isnan() & ~log_p[:, 0].isnan()).double()


def stderr_of_mean(values: torch.Tensor) -> float:
    """Standard error of the mean of a correlated series, by batch means (see `evaluate`)."""
    blocks = math.isqrt(len(values))
    if blocks < 2:
        return math.nan
    parts = torch.tensor_split(values, blocks)
    # Lengths differ by at most one; each block counts by its share of the values.
    shares = torch.tensor([len(part) / len(values) for part in parts], dtype=torch.float64)
    means = torch.stack([part.mean() for part in parts])
    variance = (shares * (means - values.mean())).square().sum() * blocks / (blocks - 1)
    return math.sqrt(variance) if variance.isfinite() else math.nan


def _exp(x: float) -> float:
    try:
        return math.exp(x)
    except OverflowError:
        return math.inf


def _device(model: nn.Module) -> torch.device:
    # Buffers too: a model may hold all of its weights as int8 buffers.
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")


def _fitting_window(*models: Any) -> int:
    limits = [position_limit(model)[0] for model in models if isinstance(model, nn.Module)]
    return min([_WINDOW, *(limit for limit in limits if limit is not None)])


def _check_fits(model: nn.Module, windows: Sequence[Window]) -> None:
    positions, _ = position_limit(model)
    longest = max(window.input_ids.shape[1] for window in windows)
    if positions is not None and longest > positions:
        raise SmoothQuantError(
            f"A window of {longest} tokens is longer than the {positions} positions of the model; "
            "give a shorter one."
        )
    greatest = max(int(window.input_ids.max()) for window in windows)
    check_vocabulary(getattr(model, "config", None), greatest)


def _bar(items: Sequence[T], label: str, show: bool) -> Iterable[T]:
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    return track(items, label, console=console, transient=True, disable=not show)
