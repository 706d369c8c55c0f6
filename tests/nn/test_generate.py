"""`generate` of quantized models: caches, unequal prompts, beams and sampling against forward passes without a cache.

The schemes per_token and static scale each token by itself, so that an int8 layer returns the same bits for a token
whatever the other tokens of the call are. A decoding step with a cache, a padded batch and a single sequence then
differ only in the order of float sums (attention, the head): by some 3e-7 of the largest logit. That can move a value
across an edge of the rounding to int8, where a step of one value moves the logits of these models by up to 1e-2.

The scheme per_tensor scales all tokens of a call together. Other tokens in the call, even padding, change its rounding
everywhere, so only the noise of int8 bounds the difference.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from smoothquant_kernels import SmoothQuantConfig, smooth_and_quantize
from smoothquant_kernels.schemes import ACTIVATION_SCHEMES
from tests.support.models import VOCAB, make_model, token_batches

FAMILIES = ("llama", "gpt2", "opt", "qwen2")
CACHES: dict[str, dict[str, Any]] = {
    "cache": {},
    "static cache": {"cache_implementation": "static"},
    "no cache": {"use_cache": False},
}
LENGTHS = (9, 5)  # of the prompts
NEW = 6
#: The largest difference of logits, relative to the largest logit.
NEAR = {"per_token": 1e-2, "static": 1e-2, "per_tensor": 0.1}

each = pytest.mark.parametrize("family", FAMILIES)
each_scheme = pytest.mark.parametrize("scheme", ACTIVATION_SCHEMES)


@functools.cache
def model(family: str, scheme: str) -> Any:
    config = SmoothQuantConfig(activation_scheme=scheme)
    return smooth_and_quantize(
        make_model(family), token_batches(2, 16), config=config, progress=False
    )


def prompts() -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, VOCAB, (1, n), generator=generator) for n in LENGTHS]


def padded() -> tuple[Tensor, Tensor]:
    """The prompts in one batch, padded on the left, and the mask."""
    longest = max(LENGTHS)
    rows = [torch.nn.functional.pad(p, (longest - p.shape[1], 0)) for p in prompts()]
    masks = [torch.ones_like(p) for p in prompts()]
    masks = [torch.nn.functional.pad(m, (longest - m.shape[1], 0)) for m in masks]
    return torch.cat(rows), torch.cat(masks)


def generate(family: str, scheme: str, **options: Any) -> Any:
    """[sequences of prompt and NEW tokens], with the logits and scores of each step."""
    ids, mask = padded()
    plain = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0,
             "eos_token_id": None, "output_logits": True, "output_scores": True}  # fmt: skip
    made = model(family, scheme)
    made.generation_config.eos_token_id = None
    return made.generate(ids, attention_mask=mask, return_dict_in_generate=True, **plain | options)


def alone(family: str, scheme: str, sequence: Tensor, row: int) -> Tensor:
    """[NEW, V]: the logits for the new tokens of a sequence without padding, by one forward pass without a cache."""
    whole = sequence[None, max(LENGTHS) - LENGTHS[row] :]
    with torch.no_grad():
        found: Tensor = model(family, scheme)(whole, use_cache=False).logits[0]
    return found[-NEW - 1 : -1]


def assert_near(found: Tensor, right: Tensor, scheme: str) -> None:
    assert float((found - right).abs().max()) <= NEAR[scheme] * float(right.abs().max())


@pytest.mark.parametrize("how", CACHES)
@each_scheme
@each
def test_greedy_with_unequal_prompts(family: str, scheme: str, how: str) -> None:
    result = generate(family, scheme, **CACHES[how])
    steps = torch.stack(result.logits, 1)  # [rows, NEW, V]
    assert torch.equal(steps.argmax(-1), result.sequences[:, -NEW:])
    for row, sequence in enumerate(result.sequences):
        assert_near(steps[row], alone(family, scheme, sequence, row), scheme)


@pytest.mark.parametrize("how", CACHES)
@each_scheme
@each
def test_beams(family: str, scheme: str, how: str) -> None:
    """The score of a beam is the mean log-probability of its tokens, whichever beams were dropped on the way."""
    beams = 3
    result = generate(family, scheme, num_beams=beams, num_return_sequences=beams, **CACHES[how])
    assert len({tuple(sequence.tolist()) for sequence in result.sequences}) == 2 * beams
    for i, (sequence, score) in enumerate(
        zip(result.sequences, result.sequences_scores, strict=True)
    ):
        right = alone(family, scheme, sequence, i // beams)
        new = sequence[-NEW:, None]
        # A log-probability moves by at most twice as far as the logits.
        near = 2 * NEAR[scheme] * float(right.abs().max())
        assert abs(float(right.log_softmax(-1).gather(1, new).mean() - score)) <= near
        assert i % beams == 0 or score <= result.sequences_scores[i - 1]


@pytest.mark.parametrize("how", CACHES)
@each_scheme
@each
def test_sampling_with_a_seed(family: str, scheme: str, how: str) -> None:
    def sample(seed: int) -> Any:
        model(family, scheme)  # making it draws numbers too
        torch.manual_seed(seed)
        return generate(family, scheme, do_sample=True, top_k=20, **CACHES[how])

    result = sample(5)
    torch.manual_seed(5)
    drawn = [torch.multinomial(scores.softmax(-1), 1) for scores in result.scores]
    assert torch.equal(torch.cat(drawn, 1), result.sequences[:, -NEW:])
    for row, sequence in enumerate(result.sequences):
        steps = torch.stack(result.logits, 1)[row]
        assert_near(steps, alone(family, scheme, sequence, row), scheme)
    assert torch.equal(sample(5).sequences, result.sequences)
    assert not torch.equal(sample(6).sequences, result.sequences)


@each_scheme
def test_what_the_bits_of_a_token_depend_on(scheme: str) -> None:
    """The reason for the two bounds above."""
    layer = model("llama", scheme).model.layers[0].mlp.down_proj
    x = torch.randn(7, layer.in_features, generator=torch.Generator().manual_seed(2))
    x[3] *= 50.0
    whole = layer(x)
    single = torch.cat([layer(x[i : i + 1]) for i in range(len(x))])
    assert torch.equal(whole, single) == (scheme != "per_tensor")
    assert torch.equal(whole[3], single[3])  # the largest token sets the scale
