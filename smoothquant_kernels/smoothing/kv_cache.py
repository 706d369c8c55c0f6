"""Calibration of an int8 cache of keys and values: runs a model on data and keeps the largest values."""

from __future__ import annotations

from typing import Any

from torch import nn

from smoothquant_kernels.errors import SmoothQuantError
from smoothquant_kernels.kv_cache.calibration import KVCalibration, attach_calibration
from smoothquant_kernels.kv_cache.recording import KVRecorder
from smoothquant_kernels.modeling.batches import count_tokens, run_checked
from smoothquant_kernels.modeling.run import evaluating, token_mask
from smoothquant_kernels.smoothing.calibrate import (
    CalibrationData,
    calibration_bar,
    calibration_batches,
)

#: How many tokens are read unless the caller says otherwise.
KV_TOKENS = 4096


def calibrate_kv_cache(
    model: nn.Module,
    data: CalibrationData,
    *,
    tokenizer: Any = None,
    max_tokens: int = KV_TOKENS,
    window: int = 512,
    progress: bool = True,
) -> KVCalibration:
    """Measures keys, values and queries of a decoder, for an int8 cache with static scales or with smoothed keys.

    Calibrate the model that will run: smoothing may fold factors into its values, so `smooth_lm` drops a calibration
    that came before. Nothing else in the model changes.

    Args:
        model: a causal language model of transformers, float or quantized, also after `optimize_for_inference`. Its
            attention must go through transformers' `AttentionInterface`.
        data: an iterable of token-id tensors [T] or [B, T], dicts of tensors, or strings (with `tokenizer`). Padding
            (attention_mask 0) does not count.
        tokenizer: turns strings into token ids.
        max_tokens: reading stops after so many tokens.
        window: strings are cut into windows of this many tokens.
        progress: whether to show a progress bar.

    Returns:
        The calibration, which is `model.smoothquant_kv_calibration` from now on: `Int8KVCache` finds it there, and
        `save_quantized` stores it.

    Raises:
        SmoothQuantError: no data, wrong data, a model without such attention, or NaN or Inf in a layer, which the
            message names. The model then keeps the calibration that it had.

    Equivalent to:
        for each layer, after its rotary embedding: k_absmax[h, d] = max over tokens of |k[:, h, :, d]|; likewise v, and
        q over the heads that read kv head h

    Source: SmoothQuant (Xiao et al., 2022), section 3.2, for keys and values.
    """
    if type(max_tokens) is not int or max_tokens < 1:
        raise SmoothQuantError(f"max_tokens must be a whole number from 1, not {max_tokens!r}.")
    recorder = KVRecorder(model)
    batches = calibration_batches(
        data, tokenizer=tokenizer, window=window, max_tokens=max_tokens, model=model
    )
    tokens = 0
    with evaluating(model), recorder.watching(), calibration_bar(progress) as bar:
        task = bar.add_task("calibrating the cache (tokens)", total=max_tokens)
        for batch in batches:
            recorder.start(token_mask(batch))
            run_checked(model, batch)
            tokens += count_tokens(batch)
            bar.advance(task, count_tokens(batch))
    if not tokens:
        raise SmoothQuantError("there is no calibration data: pass at least one batch with tokens.")
    calibration = recorder.calibration(tokens)
    attach_calibration(model, calibration)
    return calibration
