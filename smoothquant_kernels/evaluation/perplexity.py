"""How good a language model is, and how far a quantized one is from the original.

Two perplexities that differ by half a percent say little, because rounding the weights to bfloat16 alone changes them
that much. So a model is compared with its reference token by token. The results are the difference of their
log-likelihoods on the same token (far less noisy than either) and the KL divergence of their distributions, both with a
standard error, and how often both prefer the same token.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from smoothquant_kernels.errors import SmoothQuantError
from smoothquant_kernels.evaluation.last_word import last_word_accuracy
from smoothquant_kernels.evaluation.scoring import _bar, _check_fits, _fitting_window, _logits
from smoothquant_kernels.evaluation.text import Window, load_text, token_windows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["EvaluationResult", "Reference", "evaluate", "last_word_accuracy"]

_GIB = 2**30
# How many rows of a [tokens, vocabulary] matrix are compared at a time. With so few, the temporaries stay in a CPU's
# cache, which makes the comparison three times as fast as with the whole matrix.
_ROWS = 16


@dataclass(frozen=True)
class EvaluationResult:
    """What `evaluate` measured: None if it was not requested, nan if it has no value."""

    tokens: int  # scored
    perplexity: float  # exp(nll)
    nll: float  # mean negative log-likelihood, nats per token
    nll_stderr: float
    mean_kl: float | None  # mean KL(reference || model), nats per token
    kl_stderr: float | None
    top1_agreement: float | None  # share of tokens where both prefer the same token
    delta_nll: float | None  # nll minus the reference's: positive if the model is worse
    delta_nll_stderr: float | None
    last_word_accuracy: float | None
    seconds: float  # wall time of the whole call

    def to_dict(self) -> dict[str, int | float | None]:
        """Field names and values, for JSON (nan and inf stay floats)."""
        return asdict(self)


class Reference:
    """A model to compare others with. It keeps its answers.

    Log-probabilities stay in memory, in float32, as long as they fit. One token takes 4 bytes times the vocabulary
    (4,096 tokens of a vocabulary of 49,152 take 0.75 GiB). Windows beyond that run again each time, so any text can be
    evaluated and only the time differs. The model must not change: smooth or quantize a copy of it.

    Args:
        model: the reference.
        max_bytes: the bound for the memory; 0 keeps nothing.
    """

    def __init__(self, model: nn.Module, *, max_bytes: int = 2 * _GIB) -> None:
        self.model = model
        self.max_bytes = max_bytes
        self.used_bytes = 0
        self._known: dict[tuple[bytes, int], torch.Tensor] = {}

    def log_probs(self, window: Window) -> torch.Tensor:
        """[scored, vocabulary] float32 log-probabilities, on the CPU if they were kept."""
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
    """The perplexity of a model on a text and, given a reference, the distance of the model from it.

    Each token is scored once (see `token_windows`). Log-probabilities are float32 whatever the model's type, and means
    are float64. NaN or infinite logits give a perplexity of nan or inf, without an error.

    Standard errors use batch means. Neighboring tokens share their context, so their values are correlated, and the
    usual s / sqrt(n) is too small. The n tokens, in the order of the text, are cut into about sqrt(n) contiguous blocks
    of about sqrt(n) tokens, and the standard error follows from the scatter of the block means. As the text grows,
    the length of the blocks outgrows any fixed correlation length and their number grows too, so the estimate is
    consistent.

    Args:
        model: a causal language model, original or quantized: `model(input_ids=[1, T]).logits` is [1, T, V].
        text: as for `load_text`. Pass a text itself in a list.
        tokenizer: turns the text into tokens.
        reference: the model to compare with, of the same vocabulary. To compare several models with it, pass one
            `Reference(model)` to all calls. It keeps its answers.
        window, stride, max_tokens: see `token_windows`. The default window is 512 tokens, or fewer if one of the models
            has fewer positions.
        last_word: measure `last_word_accuracy` too, on passages that together have at most `max_tokens` tokens.
        progress: show a progress bar on stderr.

    Returns:
        An `EvaluationResult`.

    Raises:
        SmoothQuantError: the text is missing or too short, a size is out of range, the window is longer than the
            model's positions, or tokenizer, model and reference do not share a vocabulary.

    Equivalent to:
        lp = log_softmax(model(ids).logits[:, :-1].float(), -1)    # per window
        nll = -lp.gather(-1, ids[:, 1:, None]).mean(); perplexity = exp(nll)
        kl = (ref_lp.exp() * (ref_lp - lp)).sum(-1).mean()

    Source: perplexity as in SmoothQuant (Xiao et al., 2022), section 5; batch means: Flegal and Jones, "Batch means and
        spectral variance estimators in Markov chain Monte Carlo" (2010).
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


def _log_probs(model: nn.Module, window: Window) -> torch.Tensor:
    return torch.log_softmax(_logits(model, window).float(), dim=-1)


def _compare(
    model: nn.Module, window: Window, reference: Reference | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Four values for each scored token, in float64 on the CPU. All but the first are empty without a reference.

    They are nll, nll minus the reference's, KL(reference || model), and whether the most probable token is the same
    (0 or 1).
    """
    if reference is not None and reference.model is model:
        log_p = reference.log_probs(window)  # so that the model runs once
    else:
        log_p = _log_probs(model, window)
    return compare_log_probs(
        log_p, window, None if reference is None else reference.log_probs(window)
    )


def compare_log_probs(
    log_p: torch.Tensor, window: Window, log_r: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The four values of each scored token, from the log-probabilities [scored, vocabulary] of model and reference."""
    targets = window.input_ids[0, -window.scored :, None].to(log_p.device)
    nll = -log_p.gather(-1, targets)[:, 0].double().cpu()
    if log_r is None:
        nothing = nll.new_empty(0)
        return nll, nothing, nothing, nothing
    log_r = log_r.to(log_p.device)
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
    # log_softmax spreads one NaN over its row. Such a row prefers no token.
    same = log_r.argmax(-1) == log_p.argmax(-1)
    return (same & ~log_r[:, 0].isnan() & ~log_p[:, 0].isnan()).double()


def stderr_of_mean(values: torch.Tensor) -> float:
    """The standard error of the mean of a correlated series, by batch means (see `evaluate`)."""
    blocks = math.isqrt(len(values))
    if blocks < 2:
        return math.nan
    parts = torch.tensor_split(values, blocks)
    # Lengths differ by at most one, so each block is weighted by its share of the values.
    shares = torch.tensor([len(part) / len(values) for part in parts], dtype=torch.float64)
    means = torch.stack([part.mean() for part in parts])
    variance = (shares * (means - values.mean())).square().sum() * blocks / (blocks - 1)
    return math.sqrt(variance) if variance.isfinite() else math.nan


def _exp(x: float) -> float:
    try:
        return math.exp(x)
    except OverflowError:
        return math.inf
