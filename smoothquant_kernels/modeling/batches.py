"""Batches as models take them: what their entries are, how many positions they hold, and how to take a part of one.

An entry belongs to a stream: the text (or whatever else `attention_mask` covers), the decoder's text, or a stream of
its own (images, sound). Two streams may have the same length by chance. So the names that transformers gives the
entries distinguish streams, and shapes matter only within a stream.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from smoothquant_kernels.errors import SmoothQuantError
from smoothquant_kernels.modeling.hooks import Hooks
from smoothquant_kernels.modeling.run import Batch, evaluating, run, token_mask
from smoothquant_kernels.nn.float_linear import is_float_linear

TEXT, DECODER = "", "decoder_"
_TEXT_ENTRIES = ("input_ids", "inputs_embeds")
# In a batch without text, the first of these that it holds gives the number of rows.
_MAIN_ENTRIES = ("input_features", "input_values", "pixel_values", "pixel_values_videos")
# Each is a stream of its own, with its own mask if it has one (`pixel_attention_mask`).
_OTHER_STREAMS = ("pixel_", "encoder_", "image", "video", "audio", "input_features_", "spatial_")
_SAMPLE_TOKENS = 32  # enough to find structure; tracing keeps every linear's inputs for all of them


def main_entry(batch: Batch) -> str:
    """The name of the entry that defines the rows of a batch: the token ids if there are any."""
    known = (*_TEXT_ENTRIES, *_MAIN_ENTRIES)
    return next((name for name in known if name in batch), next(iter(batch)))


def is_seq2seq(batch: Batch, model: nn.Module | None) -> bool:
    """Whether a separate decoder reads `labels`."""
    config = getattr(model, "config", None)
    return bool(getattr(config, "is_encoder_decoder", False)) or any(
        name.startswith(DECODER) for name in batch
    )


def stream_of(name: str, batch: Batch, model: nn.Module | None = None) -> str:
    """The stream of an entry, as the prefix of its mask's name (empty for `attention_mask`)."""
    if name.startswith(DECODER) or (name == "labels" and is_seq2seq(batch, model)):
        return DECODER
    if name == main_entry(batch):
        # Images with their own mask are not text, even in a batch without text.
        return "pixel_" if "pixel_attention_mask" in batch and name not in _TEXT_ENTRIES else TEXT
    return next((prefix for prefix in _OTHER_STREAMS if name.startswith(prefix)), TEXT)


def stream_shape(stream: str, batch: Batch) -> tuple[int, int] | None:
    """(rows, positions) of a text or of what a mask covers, or None if the batch has no such stream."""
    names = [f"{stream}input_ids", f"{stream}inputs_embeds", f"{stream}attention_mask"]
    for name in [*names, "labels"] if stream == DECODER else names:
        v = batch.get(name)
        if v is not None and (v.dim() == 3 if name.endswith("embeds") else v.dim() == 2):
            return v.shape[0], v.shape[1]
    return None


def position_axes(name: str, v: Tensor, rows: int, length: int) -> tuple[int, ...]:
    """The axes of an entry that count positions, in a stream of `rows` x `length`. Without any, it is never cut."""
    shape = tuple(v.shape)
    if "mask" in name and len(shape) >= 3 and shape[-2:] == (length, length):
        return (len(shape) - 2, len(shape) - 1)  # [B, T, T] or [B, 1, T, T]
    if name == "position_ids" and len(shape) == 3 and shape[1:] == (rows, length):
        return (2,)  # one row each for time, height and width
    if name in ("position_ids", "cache_position") and shape in ((length,), (1, length)):
        return (len(shape) - 1,)
    return (1,) if shape[:2] == (rows, length) else ()


def take_positions(
    batch: Batch, stream: str, index: Tensor, model: nn.Module | None = None
) -> Batch:
    """Returns the batch with only these positions of one stream."""
    shape = stream_shape(stream, batch)
    if shape is None:
        return batch
    result = dict(batch)
    for name, v in batch.items():
        if stream_of(name, batch, model) == stream:
            for axis in position_axes(name, v, *shape):
                result[name] = result[name].index_select(axis, index.to(v.device))
    return result


def special_tokens(model: nn.Module | None, *, placeholders: bool = False) -> set[int]:
    """Ids that the model's configuration names (padding, end, images), with `placeholders` only of images and sound."""
    found: set[int] = set()

    def collect(config: Any) -> None:
        for name, value in vars(config).items():
            words = name.split("_")
            if {"token", "id"} <= set(words) or {"token", "index"} <= set(words):
                media = any(w in ("image", "video", "audio", "vision", "speech") for w in words)
                if media or not placeholders:
                    values = value if isinstance(value, (list, tuple)) else [value]
                    found.update(v for v in values if type(v) is int)
            elif name.endswith("_config") and hasattr(value, "__dict__"):
                collect(value)

    config = getattr(model, "config", None)
    if hasattr(config, "__dict__"):
        collect(config)
    return found


def take_rows(batch: Batch, rows: Sequence[int], model: nn.Module | None = None) -> Batch | None:
    """Returns some rows of all entries, or None if one does not split by rows (images of several rows in one list)."""
    main = batch[main_entry(batch)]
    if not main.dim():
        return None
    count = main.shape[0]
    if count == 1:
        return batch
    # Rows with several images and rows with none may together hold as many images as rows.
    ids = batch.get("input_ids")
    media = [n for n in batch if stream_of(n, batch, model) not in (TEXT, DECODER)]
    if ids is not None and media:
        marks = torch.tensor(sorted(special_tokens(model, placeholders=True)), device=ids.device)
        if len(torch.isin(ids, marks).flatten(1).sum(1).unique()) > 1:
            return None
    result = {}
    for name, v in batch.items():
        shape = tuple(v.shape)
        if shape[:1] == (count,):
            result[name] = v[list(rows)]
        elif name == "position_ids" and len(shape) == 3 and shape[1] == count:
            result[name] = v[:, list(rows)]
        elif not shape or (shape[0] == 1 and stream_of(name, batch, model) == TEXT):
            result[name] = v  # one value for all rows
        elif name in ("position_ids", "cache_position") and len(shape) == 1:
            result[name] = v
        else:
            return None
    return result


# --- size -------------------------------------------------------------------------------------------------------------


def has_tokens(batch: Batch) -> bool:
    """Whether a batch holds text, as token ids or as embeddings."""
    return any(name in batch for name in _TEXT_ENTRIES)


def count_tokens(batch: Batch, otherwise: int | None = None) -> int:
    """Counts the tokens that are not padding. Without text, returns `otherwise` or the rows (images, recordings)."""
    main = batch[main_entry(batch)]
    if not has_tokens(batch):
        rows = main.shape[0] if main.dim() else 1
        return rows if otherwise is None else otherwise
    tokens = main if main_entry(batch) == "input_ids" else main[..., 0]
    mask = token_mask(batch)
    return int(mask.sum()) if mask is not None and mask.shape == tokens.shape else tokens.numel()


class PositionCounter:
    """Counts the positions that a model reads in a batch: tokens or, without text, what the model makes of it.

    A batch without text counts as the most rows that any linear reads, such as patches of images or frames of sound.
    That takes one run of the model for each input shape, on a single row if the batch splits by rows.
    """

    def __init__(self, model: nn.Module | None) -> None:
        self._model = model
        self._known: dict[Any, int] = {}

    def __call__(self, batch: Batch) -> int:
        if has_tokens(batch) or self._model is None:
            return count_tokens(batch)
        one = take_rows(batch, [0], self._model)
        count, part = (1, batch) if one is None else (count_tokens(batch), one)
        key = tuple((n, tuple(v.shape)) for n, v in part.items())
        if key not in self._known:
            self._known[key] = _most_rows(self._model, part)
        return count * self._known[key]


def _most_rows(model: nn.Module, batch: Batch) -> int:
    rows = [count_tokens(batch)]
    with Hooks(model) as hooks, evaluating(model):
        for module in filter(is_float_linear, model.modules()):
            hooks.on_input(module, lambda x: rows.append(x.numel() // max(1, x.shape[-1])))
        run_checked(model, batch)
    return max(rows)


# --- running ----------------------------------------------------------------------------------------------------------


def position_limit(model: nn.Module | None) -> tuple[int | None, bool]:
    """The number of positions that a model supports, and whether a longer text runs out of position embeddings."""
    config = getattr(model, "config", None)
    if config is not None and hasattr(config, "get_text_config"):
        config = config.get_text_config()
    names = (
        "max_position_embeddings",
        "n_positions",
        "max_seq_len",
        "max_sequence_length",
        "n_ctx",
    )
    values = [getattr(config, name, None) for name in names]
    limit = next((v for v in values if type(v) is int and v > 0), None)
    if limit is None or model is None:
        return limit, False
    for name, module in model.named_modules():
        last = name.rsplit(".", 1)[-1].lower()
        if isinstance(module, nn.Embedding) and ("pos" in last or last == "wpe"):
            if limit <= module.num_embeddings <= limit + 2 and "rel" not in last:
                # RoBERTa's positions start after its padding index, so it has two fewer than its table.
                taken = (module.padding_idx or 0) + 1 if module.padding_idx is not None else 0
                return min(limit, module.num_embeddings - taken), True
    return limit, False


def _is_too_long(model: nn.Module, batch: Batch) -> str | None:
    """One sentence if a row is longer than the model's position table, which the model may not use (ESM), else None."""
    ids = batch.get("input_ids")
    limit, hard = position_limit(model)
    if ids is None or not hard or limit is None or ids.dim() < 2 or ids.shape[-1] <= limit:
        return None
    return (
        f"a calibration batch has {ids.shape[-1]} tokens in a row and {type(model).__name__} has {limit} "
        "positions: cut the rows, or pass strings, which are cut into windows of calibration_window tokens, at "
        "most as long as the model."
    )


def run_checked(model: nn.Module, batch: Batch, *, logits: bool = False) -> Any:
    """Calls `run`, without the logits by default, with its errors `explained`."""
    return explained(model, batch, lambda: run(model, batch, logits=logits))


def explained(model: nn.Module, batch: Batch, call: Callable[[], Any]) -> Any:
    """Returns what `call` returns. If the model refuses the batch, the error says why in one sentence.

    Raises:
        SmoothQuantError: the batch is too long for the model, lacks the decoder's text, or the model refuses it.
    """
    try:
        return call()
    except (TypeError, ValueError, IndexError, RuntimeError) as error:
        if isinstance(error, (SmoothQuantError, torch.OutOfMemoryError, torch.AcceleratorError)):
            raise
        if (too_long := _is_too_long(model, batch)) is not None:
            raise SmoothQuantError(too_long) from error
        entries = ", ".join(map(_described, batch, batch.values()))
        name = type(model).__name__
        if is_seq2seq(batch, model) and not any(
            n == "labels" or n.startswith(DECODER) for n in batch
        ):
            raise SmoothQuantError(
                f"{name} is an encoder-decoder, and the calibration batch ({entries}) has nothing for its decoder to "
                "read: pass `labels` or `decoder_input_ids` as well, the token ids of the texts that it should write "
                "(`tokenizer(texts, text_target=targets, return_tensors='pt')` makes both)."
            ) from error
        raise SmoothQuantError(
            f"{name} does not run on a calibration batch with {entries} "
            f"({type(error).__name__}: {' '.join(str(error).split())[:300]}): pass what its forward takes."
        ) from error


def _described(name: str, v: Tensor) -> str:
    dtype = f"{v.dtype} ".removeprefix("torch.") if v.is_floating_point() else ""
    return f"{name} {dtype}{list(v.shape)}"


# --- the sample -------------------------------------------------------------------------------------------------------


def _is_text_only(batch: Batch, model: nn.Module | None) -> bool:
    """Whether all entries are text or one value a row, so that the model reads a shorter text in the same way."""
    for name, v in batch.items():
        stream = stream_of(name, batch, model)
        shape = stream_shape(stream, batch) if stream in (TEXT, DECODER) else None
        values = v.dim() <= 1 or (v.dim() == 2 and v.shape[1] == 1)
        if not values and (shape is None or not position_axes(name, v, *shape)):
            return False
    return has_tokens(batch)


def _first_positions(batch: Batch, model: nn.Module | None, count: int) -> Batch:
    """At most `count` positions of each text, starting at the first one that is not padding in its first row."""
    for stream in (TEXT, DECODER):
        shape = stream_shape(stream, batch)
        if shape is None or shape[1] <= count:
            continue
        mask = token_mask(batch, f"{stream}attention_mask")
        start = 0
        if mask is not None and tuple(mask.shape) == shape and bool(mask[0].any()):
            start = min(int(mask[0].int().argmax()), shape[1] - count)
        batch = take_positions(batch, stream, torch.arange(start, start + count), model)
    return batch


def small_batch(batch: Batch, try_run: Callable[[Batch], Any], model: nn.Module) -> Batch:
    """Returns a part of a batch to find structure and verify folds on. The model must run on it as on the whole.

    The part is the first tokens of one row if all entries are text, one whole row if some are images or sound, and the
    whole batch if these do not split by rows. If the model refuses a part (it may need an end token), the next follows.

    Args:
        try_run: runs the model. An error that it raises counts as a refusal.
    """
    row = batch
    if (main := batch[main_entry(batch)]).dim() and main.shape[0] > 1:
        mask = token_mask(batch)
        matches = mask is not None and mask.shape[0] == main.shape[0]
        first = int(mask.any(1).int().argmax()) if matches and mask is not None else 0
        row = take_rows(batch, [first], model) or batch
    parts = [row] if row is not batch else []
    if _is_text_only(row, model):
        parts.insert(0, _first_positions(row, model, _SAMPLE_TOKENS))
    for part in parts:
        try:
            try_run(part)
        except (TypeError, ValueError, IndexError, RuntimeError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            continue
        return part
    return batch


def shortened(batch: Batch, tokens: int, model: nn.Module | None = None) -> Batch:
    """Cuts a batch of one row of text to `tokens` tokens that are not padding. Returns any other batch unchanged."""
    shape = stream_shape(TEXT, batch)
    if shape is None or shape[0] != 1 or not has_tokens(batch):
        return batch
    # A cut could separate images from their placeholders, and a decoder's text belongs to the whole source.
    if not _is_text_only(batch, model) or any(stream_of(n, batch, model) for n in batch):
        return batch
    mask = token_mask(batch)
    if mask is None or tuple(mask.shape) != shape:
        return take_positions(batch, TEXT, torch.arange(min(tokens, shape[1])), model)
    end = int((mask[0].cumsum(0) < tokens).sum()) + 1
    return take_positions(batch, TEXT, torch.arange(min(end, shape[1])), model)


def rows_of(batch: Batch, model: nn.Module | None = None) -> Iterator[Batch]:
    """Yields one batch for each row, or the batch itself if it does not split by rows."""
    main = batch[main_entry(batch)]
    parts = [take_rows(batch, [i], model) for i in range(main.shape[0] if main.dim() else 0)]
    if not parts or any(part is None for part in parts):
        yield batch
    else:
        yield from (part for part in parts if part is not None)
