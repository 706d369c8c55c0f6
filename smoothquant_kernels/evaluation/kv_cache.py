"""What a cache of keys and values costs in accuracy, measured token by token, and how much memory it takes.

A perplexity of whole windows never reads a cache. Here each token is a step of its own, as in generation, so that it
reads the cached keys and values of all earlier ones. The float cache of transformers goes the same way, and both are
compared on the same token.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from smoothquant_kernels.errors import SmoothQuantError
from smoothquant_kernels.evaluation.perplexity import _exp, compare_log_probs, stderr_of_mean
from smoothquant_kernels.evaluation.scoring import _bar, _check_fits, _fitting_window
from smoothquant_kernels.evaluation.text import Window, load_text, token_windows
from smoothquant_kernels.modeling.run import evaluation_mode, model_device

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["CacheReference", "CacheResult", "cache_bytes", "evaluate_cache"]

_GIB = 2**30


@dataclass(frozen=True)
class CacheResult:
    """What `evaluate_cache` measured."""

    tokens: int  # scored
    perplexity: float  # through the cache
    float_perplexity: float  # through the float cache
    delta_nll: float  # nats per token more than through the float cache
    delta_nll_stderr: float
    mean_kl: float  # mean KL(float cache || cache), nats per token
    kl_stderr: float
    top1_agreement: float  # share of tokens where both prefer the same token
    cache_tokens: int  # the most that the cache held
    cache_bytes: int  # its bytes then
    float_cache_bytes: int  # those of the float cache, in the model's type
    float16_cache_bytes: int  # what those would be in float16
    seconds: float  # wall time of the whole call

    def to_dict(self) -> dict[str, int | float]:
        """Field names and values, for JSON."""
        return asdict(self)


class CacheReference:
    """A model with the float cache of transformers, to compare other caches with. It keeps its answers.

    Args:
        model: the model; it must not change.
        step: how many tokens the model reads at a time.
        max_bytes: the bound for the memory of answers; further windows run again each time.
    """

    def __init__(self, model: nn.Module, *, step: int = 1, max_bytes: int = 2 * _GIB) -> None:
        self.model, self.step, self.max_bytes = model, step, max_bytes
        self._used = 0
        self._known: dict[tuple[bytes, int], tuple[Tensor, int]] = {}

    def answers(self, window: Window) -> tuple[Tensor, int]:
        """[scored, vocabulary] float32 log-probabilities, and the bytes of the full cache."""
        key = (window.input_ids.cpu().numpy().tobytes(), window.scored)
        if key not in self._known:
            from transformers import DynamicCache

            cache: Any = DynamicCache(config=getattr(self.model, "config", None))
            found = _log_probs(self.model, window, cache, self.step)
            answer = found.cpu(), cache_bytes(cache)
            if self._used + found.nbytes > self.max_bytes:
                return answer
            self._used += found.nbytes
            self._known[key] = answer
        return self._known[key]


def evaluate_cache(
    model: nn.Module,
    text: str | Path | Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    make_cache: Callable[[], Any],
    *,
    reference: CacheReference | None = None,
    window: int | None = None,
    max_tokens: int | None = None,
    step: int = 1,
    progress: bool = False,
) -> CacheResult:
    """Compares a cache with the float cache of transformers, token by token, on a text.

    Args:
        model: a causal language model of transformers, float or quantized.
        text: as for `load_text`. Pass a text itself in a list.
        tokenizer: turns the text into tokens.
        make_cache: returns a new empty cache, such as ``lambda: Int8KVCache(model)``. It is called for each window.
        reference: the same model's `CacheReference`, which several calls may share; its step must be the same.
        window, max_tokens: as for `evaluate`.
        step: how many tokens the model reads at a time; with more than 1, a cache that leaves the newest tokens in
            float loses less than in generation.
        progress: show a progress bar on stderr.

    Returns:
        A `CacheResult`. Standard errors are those of `evaluate`.

    Raises:
        SmoothQuantError: the text is missing or too short, a size is out of range, or the model takes no cache.

    Equivalent to:
        for t in range(T): logits[t] = model(ids[:, t : t + 1], cache=cache).logits[0, -1]
    """
    begin = time.perf_counter()
    if type(step) is not int or step < 1:
        raise SmoothQuantError(f"step must be a whole number of tokens from 1, not {step!r}.")
    texts = load_text(text)
    window = _fitting_window(model) if window is None else window
    windows = token_windows(texts, tokenizer, window=window, max_tokens=max_tokens)
    _check_fits(model, windows)
    reference = reference or CacheReference(model, step=step, max_bytes=0)
    if reference.step != step or reference.model is not model:
        raise SmoothQuantError(
            "the reference must be of the same model and step: make a CacheReference of this model."
        )
    scores, most, floats, held = [], 0, 0, 0
    for item in _bar(windows, "evaluating the cache", progress):
        log_r, float_size = reference.answers(item)
        cache = make_cache()
        log_p = _log_probs(model, item, cache, step)
        most, floats = max(most, cache_bytes(cache)), max(floats, float_size)
        held = max(held, item.input_ids.shape[1] - 1)
        del cache
        scores.append(compare_log_probs(log_p, item, log_r))
    nll, delta, kl, agree = (torch.cat(column) for column in zip(*scores, strict=True))
    return CacheResult(
        tokens=len(nll),
        perplexity=_exp(nll.mean().item()),
        float_perplexity=_exp((nll - delta).mean().item()),
        delta_nll=delta.mean().item(),
        delta_nll_stderr=stderr_of_mean(delta),
        mean_kl=kl.mean().item(),
        kl_stderr=stderr_of_mean(kl),
        top1_agreement=agree.mean().item(),
        cache_tokens=held,
        cache_bytes=most,
        float_cache_bytes=floats,
        float16_cache_bytes=floats * 2 // _float_type(model).itemsize,
        seconds=time.perf_counter() - begin,
    )


def cache_bytes(cache: Any) -> int:
    """The bytes of the memory that a cache of any kind holds, of capacity that is not used yet as well."""
    storages = {}
    for tensor in _tensors(cache, set()):
        storage = tensor.untyped_storage()
        if not tensor.is_meta:
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def _tensors(value: Any, seen: set[int]) -> Iterator[Tensor]:
    """All tensors that an object holds, in its containers and attributes. A model that it refers to is not its own."""
    if isinstance(value, Tensor):
        yield from _parts(value)
        return
    if id(value) in seen or isinstance(value, (nn.Module, type, str, bytes)):
        return
    seen.add(id(value))
    if isinstance(value, dict):
        parts: Sequence[Any] = list(value.values())
    elif isinstance(value, (list, tuple, set)):
        parts = list(value)
    else:
        parts = list(getattr(value, "__dict__", {}).values())
    for part in parts:
        yield from _tensors(part, seen)


def _parts(tensor: Tensor) -> Iterator[Tensor]:
    """The plain tensors of a tensor, of which quantized ones of other packages have several."""
    if hasattr(tensor, "__tensor_flatten__"):
        for name in tensor.__tensor_flatten__()[0]:
            yield from _parts(getattr(tensor, name))
    else:
        yield tensor


def _log_probs(model: nn.Module, window: Window, cache: Any, step: int) -> Tensor:
    """[scored, V] float32, of a model that reads `step` tokens at a time through a cache."""
    names = inspect.signature(model.forward).parameters
    name = next((n for n in ("cache", "past_key_values") if n in names), None)
    if name is None:
        raise SmoothQuantError(
            f"{type(model).__name__} takes no cache of keys and values, so it has none to measure."
        )
    ids = window.input_ids[:, :-1].to(model_device(model))
    first = ids.shape[1] - window.scored  # the last token before the first one that is scored
    found = []
    with torch.no_grad(), evaluation_mode(model):
        for start in range(0, ids.shape[1], step):
            part = ids[:, start : start + step]
            logits = model(input_ids=part, use_cache=True, **{name: cache}).logits[0]
            if start + len(logits) > first:
                scored = logits[max(0, first - start) :].float()
                found.append(torch.log_softmax(scored, dim=-1))
    return torch.cat(found)


def _float_type(model: nn.Module) -> torch.dtype:
    dtype = getattr(model, "dtype", torch.float32)
    return dtype if isinstance(dtype, torch.dtype) else torch.float32
