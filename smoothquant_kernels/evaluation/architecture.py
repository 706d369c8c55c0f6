"""What a model reads and writes, derived from its configuration before its weights are loaded."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, Literal

from smoothquant_kernels.errors import SmoothQuantError

Kind = Literal["causal", "text", "images"]
_PYTHON = "in Python, pass such batches (dicts of tensors by name) to smooth_and_quantize"


def architecture(config: Any) -> str:
    """The model class that a configuration names, or "" if it names none."""
    names: Sequence[str] | None = getattr(config, "architectures", None)
    return str(names[0]) if names else ""


def model_class(config: Any) -> Any:
    """The class that loads the model: the one that config.json names, or else AutoModelForCausalLM.

    A causal language model always loads as one, whatever head config.json names. An example is the text model inside a
    model with images.
    """
    import transformers

    name = architecture(config)
    if not name or name in _causal_names():
        return transformers.AutoModelForCausalLM
    found = getattr(transformers, name, None)
    if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
        return found
    return transformers.AutoModelForCausalLM  # runs the repository's code, if that is allowed


def is_causal(config: Any) -> bool:
    """Whether the model predicts the next token of a text. GGUF files (None) and unknown classes count as such."""
    import transformers

    name = "" if config is None else architecture(config)
    if getattr(config, "is_encoder_decoder", False):
        return False
    # A class that transformers lacks is the repository's own code.
    return not name or name in _causal_names() or not hasattr(transformers, name)


def kind_of(config: Any) -> Kind:
    """The kind of model, which decides whether the command line calibrates it on text or on images.

    Raises:
        SmoothQuantError: neither text nor images alone suffice. The message says what the Python API takes.
    """
    if is_causal(config):
        return "causal"
    name, found = architecture(config), model_class(config)
    known, required = _inputs(found)
    main = str(getattr(found, "main_input_name", "input_ids"))
    if main == "pixel_values" and required <= {"pixel_values"} and "decoder_input_ids" not in known:
        return "images"
    if "decoder_input_ids" in known:
        raise SmoothQuantError(
            f"{name} is an encoder-decoder, which reads two inputs at once, and the command line calibrates on one: "
            f"{_PYTHON}, for example {main} with labels."
        )
    towers = any(hasattr(config, key) for key in ("vision_config", "audio_config"))
    if main == "input_ids" and not towers:
        return "text"
    raise SmoothQuantError(
        f"{name} reads {', '.join(sorted(required | {main}))}{' and more' if towers else ''}, and the command line "
        f"calibrates on text or on images alone: {_PYTHON}."
    )


def check_causal(config: Any, source: object, command: str) -> None:
    """Raises SmoothQuantError unless the model is a causal language model."""
    if is_causal(config):
        return
    try:
        kind_of(config)
    except SmoothQuantError:
        others = f"no command takes it: {_PYTHON}"
    else:
        others = "quantize, inspect and report take it"
    raise SmoothQuantError(
        f"{command} needs a causal language model, and {source} is a {architecture(config)}; {others}."
    )


def _causal_names() -> set[str]:
    from transformers.models.auto import modeling_auto

    names: Any = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    return {n for v in names.values() for n in ((v,) if isinstance(v, str) else v)}


def _inputs(cls: Any) -> tuple[set[str], set[str]]:
    """The names of the arguments of `cls.forward`, and of those without a default."""
    parameters = list(inspect.signature(cls.forward).parameters.values())[1:]
    kinds = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    required = {p.name for p in parameters if p.default is p.empty and p.kind not in kinds}
    return {p.name for p in parameters}, required
