"""The calibration data of the commands: windows of a text or images, depending on the kind of model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, tensor

from smoothquant_kernels.cli.console import quiet_stderr
from smoothquant_kernels.cli.loading import config_of, load_tokenizer
from smoothquant_kernels.config import SmoothQuantConfig
from smoothquant_kernels.errors import SmoothQuantError
from smoothquant_kernels.evaluation import models
from smoothquant_kernels.evaluation.architecture import Kind, architecture, kind_of
from smoothquant_kernels.evaluation.text import (
    check_vocabulary,
    front_tokens,
    load_text,
    token_ids,
    token_windows,
)
from smoothquant_kernels.storage.document import note

_IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
_MOST_IMAGES = 128  # each has hundreds of patches, so more images change the ranges little


@dataclass(frozen=True)
class Inputs:
    """Batches to calibrate on.

    Attributes:
        batches: token ids [1, T], or dicts of tensors.
        processor: the tokenizer or image processor, to be saved with the checkpoint.
        facts: the source and the amount of data, for JSON.
    """

    batches: list[Any]
    processor: Any
    facts: dict[str, Any]

    def __str__(self) -> str:
        return describe_inputs(self.facts)


def describe_inputs(facts: dict[str, Any]) -> str:
    """The facts in words, for example "4096 tokens of topics:calibration"."""
    count = f"{facts['images']} images" if facts["images"] else f"{facts['tokens']} tokens"
    return f"{count} of {facts['source']}"


def calibration_inputs(
    model: str, calibration: str, settings: SmoothQuantConfig, fallback: str | None = None
) -> Inputs:
    """The calibration data for a model from the hub, a folder or a GGUF file. It is read before the model.

    Args:
        model: the name or path of the model.
        calibration: the text or the folder of images.
        settings: the window and the number of tokens.
        fallback: the model or checkpoint whose tokenizer to use if the model has none.

    Raises:
        SmoothQuantError: the data does not exist, or the model needs other data.
    """
    config = config_of(model)
    kind: Kind = "causal" if config is None else kind_of(config)
    if kind == "images":
        return _image_inputs(model, calibration, config)
    texts = load_text(calibration)
    tokenizer = load_tokenizer(model, fallback)
    window = min([settings.calibration_window, *_longest(config, tokenizer, kind)])
    windows = text_windows(
        texts, tokenizer, window=window, tokens=settings.calibration_tokens, kind=kind
    )
    check_vocabulary(config, max(int(ids.max()) for ids in windows))
    count = sum(ids.shape[1] for ids in windows)
    if count < settings.calibration_tokens:
        note(
            f"{calibration} has {count} tokens, fewer than the {settings.calibration_tokens} asked for"
        )
    facts = {
        "source": calibration,
        "tokens": count,
        "asked": settings.calibration_tokens,
        "images": 0,
    }
    return Inputs(list(windows), tokenizer, facts)


def processor_of(model: str) -> Any:
    """The tokenizer or image processor of a model that is not calibrated."""
    config = config_of(model)
    if config is not None and kind_of(config) == "images":
        with quiet_stderr():
            return models.load_image_processor(model)
    return load_tokenizer(model)


def text_windows(
    texts: Sequence[str], tokenizer: Any, *, window: int, tokens: int, kind: Kind = "causal"
) -> list[Tensor]:
    """Token ids [1, T], at most `tokens` in all. The texts are joined, so that short ones fill whole windows.

    A model that reads in both directions also gets the tokens that its tokenizer adds after a text.
    """
    enough, size = [], 0
    for part in texts:  # tokenizing a whole corpus for a few thousand tokens would take minutes
        enough.append(part)
        size += len(part)
        if size > 32 * tokens:
            break
    if kind == "causal":
        windows = [
            w.input_ids
            for w in token_windows(
                enough, tokenizer, window=max(2, window), max_tokens=max(2, tokens)
            )
        ]
    else:
        windows = _whole_windows("\n\n".join(enough), tokenizer, window)
    left, cut = tokens, []
    for ids in windows:
        if left <= 0:
            break
        cut.append(ids[:, :left])
        left -= ids.shape[1]
    return cut


def _whole_windows(text: str, tokenizer: Any, window: int) -> list[Tensor]:
    front = front_tokens(tokenizer)
    back = list(tokenizer("a")["input_ids"])[len(front) + len(token_ids("a", tokenizer)) :]
    ids, length = token_ids(text, tokenizer), max(1, window - len(front) - len(back))
    return [
        tensor([front + ids[start : start + length] + back]) for start in range(0, len(ids), length)
    ]


def _longest(config: Any, tokenizer: Any, kind: Kind) -> list[int]:
    """The limits on the length of a window: the model's positions, and the tokenizer's maximum length."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    positions = getattr(text, "max_position_embeddings", None)
    padding = getattr(text, "pad_token_id", None)
    if kind == "text" and isinstance(positions, int) and padding in (0, 1, 2, 3):
        positions -= padding + 1  # RoBERTa-like models count positions from there
    limits = [positions, getattr(tokenizer, "model_max_length", None)]
    return [int(n) for n in limits if isinstance(n, int) and 1 < n < 10**9]


def _image_inputs(model: str, calibration: str, config: Any) -> Inputs:
    place = Path(calibration).expanduser()
    files = [place] if place.is_file() else []
    if place.is_dir():
        files = sorted(f for f in place.rglob("*") if f.suffix.lower() in _IMAGES)
    if not files:
        raise SmoothQuantError(
            f"{architecture(config)} reads images and {calibration} has none: give --calibration a folder with some "
            f"({', '.join(_IMAGES)})."
        )
    with quiet_stderr():
        processor = models.load_image_processor(model)
    if len(files) > _MOST_IMAGES:
        note(f"{calibration} has {len(files)} images, of which {_MOST_IMAGES} are taken")
        files = files[:: -(-len(files) // _MOST_IMAGES)]
    batches = [{"pixel_values": _pixels(file, processor)} for file in files]
    facts = {"source": calibration, "tokens": 0, "asked": None, "images": len(batches)}
    return Inputs(batches, processor, facts)


def _pixels(file: Path, processor: Any) -> Tensor:
    from PIL import Image

    try:
        with Image.open(file) as image:
            values = processor(images=image.convert("RGB"), return_tensors="pt")["pixel_values"]
    except Exception as error:  # formats and processors raise exceptions of any type
        reason = " ".join(str(error).split()) or type(error).__name__
        raise SmoothQuantError(
            f"{file} could not be read as an image ({reason[:300]}): give --calibration a folder of images."
        ) from error
    assert isinstance(values, Tensor)
    return values
