"""Evaluation, compared with independent computations and with models whose results are known."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from smoothquant_kernels.errors import SmoothQuantError
from smoothquant_kernels.evaluation.perplexity import Reference, evaluate, stderr_of_mean
from smoothquant_kernels.evaluation.text import token_windows, topics

VOCABULARY = 96
WORDS = [f"w{i}" for i in range(VOCABULARY)]
# The float32 sum of 96 exponentials has a relative error of at most 96 * 2^-24 = 6e-6, so its logarithm is off by
# 6e-6. Two subtractions of numbers below 16 round by 2^-21 = 5e-7 each. The error of a mean is no larger.
NLL_TOLERANCE = 1e-5


def random_text(tokens: int, seed: int = 0) -> list[str]:
    rng = np.random.default_rng(seed)
    return [" ".join(WORDS[i] for i in rng.integers(0, VOCABULARY, tokens))]


class Markov(nn.Module):
    """A model that sees only the last token: row i of `table` holds the log-probabilities after token i."""

    def __init__(self, table: Sequence[Sequence[float]] | torch.Tensor) -> None:
        super().__init__()
        self.table: torch.Tensor
        self.register_buffer("table", torch.as_tensor(table, dtype=torch.float32))
        self.calls = 0

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> SimpleNamespace:
        assert not use_cache and not torch.is_grad_enabled() and not self.training
        self.calls += 1
        return SimpleNamespace(logits=self.table[input_ids])


# --- against independent computations ---


def true_nlls(model: Any, ids: list[int], window: int, stride: int) -> np.ndarray[Any, Any]:
    """For each token, in float64: finds the window that must score it, runs the model and reads one number."""
    nlls = []
    for position in range(1, len(ids)):
        end = min(window, len(ids))
        while end <= position:
            end = min(end + stride, len(ids))
        start = max(0, end - window)
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids[start:end]])).logits[0].numpy()
        row = logits[position - start - 1].astype(np.float64)
        nlls.append(np.log(np.exp(row - row.max()).sum()) + row.max() - row[ids[position]])
    return np.array(nlls)


@pytest.mark.parametrize(
    ("tokens", "window", "stride"), [(20, 64, 63), (150, 64, 63), (101, 32, 7), (65, 64, 1)]
)
def test_perplexity_equals_a_direct_computation(
    tiny_llama: Callable[..., Any],
    word_tokenizer: Callable[..., Any],
    tokens: int,
    window: int,
    stride: int,
) -> None:
    text, model = random_text(tokens), tiny_llama()
    tokenizer = word_tokenizer(WORDS)
    result = evaluate(model, text, tokenizer, window=window, stride=stride)
    nlls = true_nlls(model, tokenizer(text[0]).input_ids, window, stride)
    assert result.tokens == tokens - 1
    assert result.nll == pytest.approx(nlls.mean(), abs=NLL_TOLERANCE)
    assert result.perplexity == pytest.approx(math.exp(nlls.mean()), rel=2 * NLL_TOLERANCE)
    assert math.log(VOCABULARY) < result.nll < 20  # random weights guess worse than chance
    assert result.mean_kl is result.delta_nll is result.last_word_accuracy is None


def test_kl_delta_and_agreement_equal_a_direct_computation(
    tiny_llama: Callable[..., Any], word_tokenizer: Callable[..., Any]
) -> None:
    text, model, other = random_text(60), tiny_llama(), tiny_llama(seed=1)
    tokenizer = word_tokenizer(WORDS)
    result = evaluate(model, text, tokenizer, reference=other, window=64)
    ids = tokenizer(text[0], return_tensors="pt").input_ids
    with torch.no_grad():
        p = model(input_ids=ids).logits[0, :-1].double().log_softmax(-1)
        r = other(input_ids=ids).logits[0, :-1].double().log_softmax(-1)
    kl = nn.functional.kl_div(p, r, reduction="none", log_target=True).sum(-1)
    delta = (r - p).gather(-1, ids[0, 1:, None])
    assert result.mean_kl == pytest.approx(kl.mean().item(), abs=NLL_TOLERANCE)
    assert result.delta_nll == pytest.approx(delta.mean().item(), abs=NLL_TOLERANCE)
    assert result.top1_agreement == (p.argmax(-1) == r.argmax(-1)).double().mean().item()


def test_a_model_does_not_differ_from_itself(
    tiny_llama: Callable[..., Any], word_tokenizer: Callable[..., Any]
) -> None:
    model = tiny_llama()
    for reference in (model, tiny_llama(), Reference(model)):
        result = evaluate(
            model, random_text(99), word_tokenizer(WORDS), reference=reference, window=40
        )
        assert result.mean_kl == result.kl_stderr == 0
        assert result.delta_nll == result.delta_nll_stderr == 0
        assert result.top1_agreement == 1


def test_log_probabilities_are_float32_for_any_model(
    tiny_llama: Callable[..., Any], word_tokenizer: Callable[..., Any]
) -> None:
    model = tiny_llama(dtype=torch.bfloat16)
    text, tokenizer = random_text(60), word_tokenizer(WORDS)
    (window,) = token_windows(text, tokenizer, window=64)
    log_probs = Reference(model).log_probs(window)
    assert log_probs.dtype == torch.float32
    # In bfloat16 the probabilities of a row add up to 1 only within some thousandths.
    torch.testing.assert_close(log_probs.exp().sum(-1), torch.ones(59), rtol=0, atol=1e-5)
    nlls = true_nlls(SimpleFloat(model), tokenizer(text[0]).input_ids, 64, 63)
    assert evaluate(model, text, tokenizer, window=64).nll == pytest.approx(
        nlls.mean(), abs=NLL_TOLERANCE
    )


class SimpleFloat:
    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, input_ids: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.model(input_ids=input_ids).logits.float())


# --- against known answers ---

# The next word's probabilities after w0 and after w1, in the reference (R) and in the model (P).
R = [[0.5, 0.5], [0.75, 0.25]]
P = [[0.25, 0.75], [0.75, 0.25]]


def log(table: Sequence[Sequence[float]]) -> torch.Tensor:
    return torch.tensor(table, dtype=torch.float64).log()


def test_known_probabilities_give_known_means_and_errors(
    word_tokenizer: Callable[..., Any],
) -> None:
    #       context: w0 w0 w1 | w1 w1 w0 | w0 w1 w1   in three blocks of three
    text = ["w0 w0 w1 w1 w1 w0 w0 w1 w1 w0"]
    result = evaluate(
        Markov(log(P)), text, word_tokenizer(["w0", "w1"]), reference=Markov(log(R)), window=6
    )
    kl = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)  # after w0; 0 after w1
    assert result.tokens == 9
    assert result.mean_kl == pytest.approx(4 / 9 * kl, rel=1e-6)
    # 2, 1 and 1 of the 3 contexts in the blocks are w0: their means are 2/3, 1/3 and 1/3 of kl. The variance of the
    # mean of three is (2/27) / 2 / 3.
    variance = sum((share - 4 / 9) ** 2 for share in (2 / 3, 1 / 3, 1 / 3)) / (3 * 2)
    assert result.kl_stderr == pytest.approx(kl * math.sqrt(variance), rel=1e-6)
    # w0, w1, w0, w1 follow w0: the model gives them 1/4, 3/4, 1/4, 3/4, the reference 1/2 each.
    up, down = math.log(0.5 / 0.25), math.log(0.5 / 0.75)
    assert result.delta_nll == pytest.approx(2 / 9 * (up + down), rel=1e-5)
    blocks = [(up + down) / 3, up / 3, down / 3]
    mean = sum(blocks) / 3
    expected = math.sqrt(sum((block - mean) ** 2 for block in blocks) / (3 * 2))
    assert result.delta_nll_stderr == pytest.approx(expected, rel=1e-5)
    # After w0, the reference has a tie and names the first, w0, and the model names w1. After w1 they agree.
    assert result.top1_agreement == pytest.approx(5 / 9)
    after_w1 = [0.25, 0.25, 0.75, 0.25, 0.75]  # w1, w1, w0, w1, w0
    nll = -sum(map(math.log, [0.25, 0.75, 0.25, 0.75, *after_w1])) / 9
    assert result.nll == pytest.approx(nll, rel=1e-6)
    assert result.perplexity == pytest.approx(math.exp(nll), rel=1e-6)


def test_zero_probabilities(word_tokenizer: Callable[..., Any]) -> None:
    tokenizer, text = word_tokenizer(["w0", "w1"]), ["w0 w0 w0 w1 w0"]
    sure, fair = Markov(log([[1.0, 0.0], [1.0, 0.0]])), Markov(log([[0.5, 0.5], [0.5, 0.5]]))
    wrong = evaluate(sure, text, tokenizer, reference=fair)
    assert wrong.perplexity == wrong.nll == wrong.mean_kl == wrong.delta_nll == math.inf
    assert math.isnan(wrong.nll_stderr)
    # A word with probability 0 in the reference adds nothing to the divergence, which is log 2.
    right = evaluate(fair, text, tokenizer, reference=sure)
    assert right.mean_kl == pytest.approx(math.log(2), rel=1e-6)
    assert right.delta_nll == -math.inf


def test_nan_is_reported_and_agrees_with_nothing(word_tokenizer: Callable[..., Any]) -> None:
    table = log([[0.5, 0.5], [0.5, 0.5]])
    table[1, 0] = math.nan
    result = evaluate(
        Markov(table), ["w0 w1 w0 w0 w0"], word_tokenizer(["w0", "w1"]), reference=Markov(table)
    )
    assert math.isnan(result.perplexity) and math.isnan(result.nll)
    assert math.isnan(result.mean_kl or 0) and math.isnan(result.delta_nll_stderr or 0)
    assert result.top1_agreement == 3 / 4


def test_a_perplexity_beyond_float_is_infinite(
    word_tokenizer: Callable[..., Any],
) -> None:
    result = evaluate(
        Markov([[0.0, 2000.0], [0.0, 0.0]]), ["w0 w0 w0"], word_tokenizer(["w0", "w1"])
    )
    assert result.nll == 2000 and result.perplexity == math.inf


def test_the_result_can_be_written_as_json(word_tokenizer: Callable[..., Any]) -> None:
    result = evaluate(Markov(log(P)), ["w0 w1 w1"], word_tokenizer(["w0", "w1"]), progress=True)
    assert json.loads(json.dumps(result.to_dict()))["tokens"] == 2
    assert math.isnan(result.nll_stderr)  # two tokens are too few for two blocks of two
    assert result.seconds > 0


# --- standard errors ---


def coverage(stderr: Callable[[torch.Tensor], float], runs: int = 400) -> float:
    """How often mean +- 1.96 standard errors contains the true mean 0 of a series with correlation 0.8 per step."""
    rng = np.random.default_rng(7)
    noise = rng.standard_normal((runs, 4200))
    series = np.zeros_like(noise)
    for t in range(1, noise.shape[1]):
        series[:, t] = 0.8 * series[:, t - 1] + noise[:, t]
    values = torch.from_numpy(series[:, 104:])  # 4,096 tokens, without the start
    hits = [abs(float(row.mean())) < 1.96 * stderr(row) for row in values]
    return hits.count(True) / runs


def test_standard_errors_account_for_correlated_neighbors() -> None:
    # With blocks of b = 64 the variance is too small by 2 rho / (1 - rho^2) / b = 7 %, which gives 94 % instead of
    # 95 %. With 64 blocks, Student's t takes off another 0.5 %. 400 runs scatter by 1.2 %, and the bounds are four
    # times that away.
    assert 0.885 < coverage(stderr_of_mean) < 0.985
    # The usual standard error is too small by a factor of sqrt((1 - rho) / (1 + rho)) = 1/3, which gives 49 %.
    assert coverage(lambda row: (row.std() / math.sqrt(len(row))).item()) < 0.6


@pytest.mark.parametrize("count", [4, 5, 11, 1000])
def test_the_standard_error_of_blocks_of_unequal_length(count: int) -> None:
    values = torch.from_numpy(np.random.default_rng(1).standard_normal(count))
    blocks = math.isqrt(count)
    parts = np.array_split(values.numpy(), blocks)
    deviations = [len(part) / count * (part.mean() - values.numpy().mean()) for part in parts]
    expected = math.sqrt(sum(d * d for d in deviations) * blocks / (blocks - 1))
    assert stderr_of_mean(values) == pytest.approx(expected, rel=1e-12)


# --- the reference's cache ---


@pytest.mark.parametrize(("kept", "calls"), [(0, 8), (2, 6), (4, 4), (99, 4)])
def test_the_reference_caches_what_fits(
    word_tokenizer: Callable[..., Any], kept: int, calls: int
) -> None:
    table, tokenizer = torch.randn(VOCABULARY, VOCABULARY), word_tokenizer(WORDS)
    text, window_bytes = random_text(41), 10 * VOCABULARY * 4  # four windows that score ten tokens
    original = Markov(table)
    reference = Reference(original, max_bytes=kept * window_bytes)
    model = Markov(torch.randn(VOCABULARY, VOCABULARY))
    first, second = (
        evaluate(model, text, tokenizer, reference=reference, window=11) for _ in range(2)
    )
    assert original.calls == calls
    assert reference.used_bytes == min(kept, 4) * window_bytes
    assert {**first.to_dict(), "seconds": 0} == {**second.to_dict(), "seconds": 0}
    anew = evaluate(model, text, tokenizer, reference=Markov(table), window=11)
    assert first.mean_kl == anew.mean_kl and first.delta_nll == anew.delta_nll


def test_the_cache_does_not_confuse_texts(word_tokenizer: Callable[..., Any]) -> None:
    table = torch.randn(VOCABULARY, VOCABULARY)
    original, twin = Markov(table), Markov(table)
    reference, tokenizer = Reference(original), word_tokenizer(WORDS)
    for seed in (0, 1):
        text = random_text(30, seed)
        assert evaluate(twin, text, tokenizer, reference=reference, window=16).mean_kl == 0
    assert original.calls == twin.calls == 4


def test_the_reference_itself_runs_once(word_tokenizer: Callable[..., Any]) -> None:
    original = Markov(torch.randn(VOCABULARY, VOCABULARY))
    tokenizer, text = word_tokenizer(WORDS), random_text(30)
    alone = evaluate(original, text, tokenizer, window=16)
    result = evaluate(original, text, tokenizer, reference=Reference(original), window=16)
    assert original.calls == 4 and result.mean_kl == 0 and result.nll == alone.nll


# --- refusals and modes ---


def test_mismatched_models_and_tokenizers_are_refused(
    tiny_llama: Callable[..., Any], word_tokenizer: Callable[..., Any]
) -> None:
    tokenizer, text = word_tokenizer(WORDS), [" ".join(WORDS)]
    small = tiny_llama(vocab_size=50)
    with pytest.raises(SmoothQuantError, match="makes token 95, but a model has only 50"):
        evaluate(small, text, tokenizer, window=64)
    with pytest.raises(SmoothQuantError, match="makes token 95, but a model has only 50"):
        evaluate(tiny_llama(), text, tokenizer, window=64, reference=small)
    few = [" ".join(WORDS[:40])]
    with pytest.raises(SmoothQuantError, match="vocabulary has 96 tokens and the reference's 50"):
        evaluate(tiny_llama(), few, tokenizer, window=64, reference=small)
    with pytest.raises(SmoothQuantError, match="window of 200 tokens is longer than the 128"):
        evaluate(tiny_llama(), random_text(300), tokenizer, window=200)
    evaluate(tiny_llama(), few, tokenizer, window=200)  # the text is shorter than the window
    for bad in ([], [" \n"], ["w1"], "./no-such-file"):
        with pytest.raises(SmoothQuantError, match=r"no text|too few to score|no file or folder"):
            evaluate(tiny_llama(), bad, tokenizer, window=64)


def test_the_training_mode_of_every_module_is_restored(
    tiny_llama: Callable[..., Any], word_tokenizer: Callable[..., Any]
) -> None:
    tokenizer, text = word_tokenizer(WORDS), random_text(40)
    plain = evaluate(tiny_llama(), text, tokenizer, window=64).nll
    model = tiny_llama(attention_dropout=0.5).train()
    model.lm_head.eval()
    assert evaluate(model, text, tokenizer, window=64).nll == plain
    assert model.training and model.model.layers[0].training and not model.lm_head.training
    assert all(weight.grad is None and weight.requires_grad for weight in model.parameters())


# --- the real model ---


@pytest.mark.real_model
def test_the_real_models_loss_equals_that_of_transformers(smollm2: tuple[Any, Any]) -> None:
    model, tokenizer = smollm2
    text = topics("evaluation")
    result = evaluate(model, text, tokenizer, window=256, max_tokens=256, reference=model)
    ids = torch.tensor([tokenizer("\n\n".join(text)).input_ids[:256]])
    with torch.no_grad():
        loss = model(input_ids=ids, labels=ids).loss.item()
    assert result.tokens == 255
    # transformers adds 255 numbers in float32, with a relative error of at most 255 * 2^-24 = 1.5e-5. Its log-softmax
    # gets the same float32 logits as ours.
    assert result.nll == pytest.approx(loss, rel=2e-5)
    assert result.mean_kl == 0 and result.top1_agreement == 1
