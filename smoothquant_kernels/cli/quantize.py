"""The work of the commands quantize, evaluate and generate: each returns what it found as plain
values, and `render_*` makes what people read from just these values."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Group
from rich.table import Table
from rich.text import Text
from torch import nn

from smoothquant_kernels._console import Document, note, quiet_stderr, readable_size, show_progress
from smoothquant_kernels._inputs import calibration_inputs, describe_inputs, processor_of
from smoothquant_kernels._inspect import (
    describe_config,
    describe_verification,
    inspect_checkpoint,
    is_checkpoint,
    render_layers,
    summarise_layers,
    weight_files,
)
from smoothquant_kernels._pipeline import (
    check_output,
    choose_device,
    choose_dtype,
    linear_bytes,
    load_any,
    load_tokenizer,
    read_config,
    tensor_bytes,
)
from smoothquant_kernels._space import check_space, checkpoint_bytes
from smoothquant_kernels.calibrate import calibrate_model
from smoothquant_kernels.checkpoint import save_quantized
from smoothquant_kernels.config import SmoothQuantConfig
from smoothquant_kernels.convert import quantize_model
from smoothquant_kernels.errors import SmoothQuantError
from smoothquant_kernels.evaluate import evaluate as evaluate_model
from smoothquant_kernels.models import load_model
from smoothquant_kernels.modules import evaluating, model_device, partition_linears
from smoothquant_kernels.smooth import INFO, check_finite_weights, smooth_lm
from smoothquant_kernels.text import check_vocabulary, load_text

__all__ = ["complete", "evaluate", "generate", "quantize", "read_config"]


# --- quantize -------------------------------------------------------------------------------------


def quantize(
    source: str,
    output: Path,
    config: SmoothQuantConfig,
    *,
    calibration: str,
    dtype: str,
    device: str,
    force: bool,
    search: bool = False,
    stream: bool = False,
    restart: bool = False,
) -> Document:
    """`smoothquant-kernels quantize`."""
    begin = time.perf_counter()
    check_output(output, force=force)
    measured = config.smooth or config.activation_scheme == "static"
    if search and stream:
        raise SmoothQuantError(
            "--search needs the whole model in memory: search first, then stream with the settings it found (--config)."
        )
    if search and not measured:
        raise SmoothQuantError(
            "there is nothing to search without smoothing: leave out --no-smooth."
        )
    if restart and not stream:
        raise SmoothQuantError("--restart drops the unfinished work of --stream; give both.")
    float_type, where = choose_dtype(dtype), choose_device(device)
    if is_checkpoint(Path(source)):
        raise SmoothQuantError(f"{source} is quantised already; give the original model.")
    if stream:
        document = _quantize_streamed(
            source, output, config, calibration=calibration, dtype=float_type, device=where,
            force=force, resume=not restart,
        )  # fmt: skip
        return {**document, "seconds": time.perf_counter() - begin}
    inputs = calibration_inputs(source, calibration, config) if measured else None
    processor = processor_of(source) if inputs is None else inputs.processor
    note(f"loading {source}")
    with quiet_stderr():
        plain: Any = load_model(source, dtype=float_type)
    model: nn.Module = plain.to(where)
    linears, skipped = partition_linears(model, config.skip)
    check_finite_weights(linears)  # before the calibration, which can take long
    before = {"model": tensor_bytes(model), "linears": linear_bytes(model, list(skipped))}
    check_space(output, checkpoint_bytes(model, linears))
    if inputs is not None:
        if search:
            config = _search(model, inputs.batches, config, output)
        note(f"calibrating on {inputs}")
        statistics = calibrate_model(model, inputs.batches, config, progress=show_progress())
        smooth_lm(model, statistics, config=config)
    quantize_model(model, config=config)
    after = {"model": tensor_bytes(model), "linears": linear_bytes(model, list(skipped))}
    note(f"saving {output}")
    save_quantized(model, output, tokenizer=processor, overwrite=force)
    info: dict[str, Any] = getattr(model, INFO)
    return {
        "model": source,
        "output": str(output),
        "config": info["config"],
        "calibration": None if inputs is None else inputs.facts,
        **summarise_layers(info["layers"], info["skipped"]),
        "verification": info.get("verification"),
        "bytes": {
            "model_before": before["model"],
            "model_after": after["model"],
            "linears_before": before["linears"],
            "linears_after": after["linears"],
            "weight_files": sum(file.stat().st_size for file in weight_files(output)),
        },
        "seconds": time.perf_counter() - begin,
    }


def _quantize_streamed(
    source: str,
    output: Path,
    config: SmoothQuantConfig,
    *,
    calibration: str,
    dtype: torch.dtype,
    device: torch.device,
    force: bool,
    resume: bool,
) -> Document:
    """The same for a model that is never in memory as a whole; what is said of it is read from the checkpoint."""
    from smoothquant_kernels._stream_source import check_folder
    from smoothquant_kernels.stream import quantize_streamed

    check_folder(Path(source))
    inputs = calibration_inputs(source, calibration, config)
    note(f"quantising {source} block by block on {inputs}")
    quantize_streamed(
        source, output, inputs.batches, config, tokenizer=inputs.processor, dtype=dtype, device=device,
        overwrite=force, resume=resume, progress=show_progress(),
    )  # fmt: skip
    found = inspect_checkpoint(output)
    layers = found["layers"]
    # The float linears, without having loaded them: their weights, and nothing for a bias.
    linears = sum(layer["out_features"] * layer["in_features"] for layer in layers)
    return {
        "model": source,
        "output": str(output),
        "config": found["config"],
        "calibration": inputs.facts,
        **{k: found[k] for k in ("quantised", "smoothing", "groups", "skipped", "verification")},
        "bytes": {
            "model_before": None,
            "model_after": found["bytes"]["quantised_layers"] + found["bytes"]["float_tensors"],
            "linears_before": linears * dtype.itemsize,
            "linears_after": found["bytes"]["quantised_layers"],
            "weight_files": sum(file.stat().st_size for file in weight_files(output)),
        },
    }


def _search(
    model: nn.Module, windows: list[Any], config: SmoothQuantConfig, output: Path
) -> SmoothQuantConfig:
    """The settings that a search finds; what it has tried so far is in a file beside the checkpoint to be."""
    from smoothquant_kernels.search import search_config

    path = output.absolute().with_name(f"{output.name}.search.json")
    note(f"searching settings for each layer; what is found is kept in {path}")
    path.parent.mkdir(parents=True, exist_ok=True)
    found = search_config(model, windows, config, path=path, progress=show_progress())
    note(
        "the settings found for each layer are kept"
        if found.kept == "searched"
        else "on further tokens they were no better than the best fixed alpha, which is kept"
    )
    return found.config


def render_quantize(document: Document) -> Group:
    size = document["bytes"]
    facts = Table.grid(padding=(0, 2))
    facts.add_row("settings", describe_config(document))
    if (calibration := document["calibration"]) is not None:
        facts.add_row("calibrated on", describe_inputs(calibration))
    facts.add_row("verified", describe_verification(document))
    # a streamed model was never there as a whole
    whole = f"{readable_size(size['model_before'])} -> " if size["model_before"] else ""
    facts.add_row(
        "size",
        f"model {whole}{readable_size(size['model_after'])}, "
        f"its quantised linears {readable_size(size['linears_before'])} -> "
        f"{readable_size(size['linears_after'])}",
    )
    facts.add_row("seconds", f"{document['seconds']:.1f}")
    saved = Text(f"saved {document['output']}", style="bold")
    return Group(render_layers(document), facts, saved)


# --- evaluate -------------------------------------------------------------------------------------


def evaluate(
    source: str,
    *,
    reference: str | None,
    text: str,
    window: int,
    max_tokens: int | None,
    last_word: bool,
    dtype: str,
    device: str,
) -> Document:
    """`smoothquant-kernels evaluate`."""
    texts = load_text(text)
    options = {"dtype": dtype, "device": device, "causal": "evaluate"}
    model, quantised = load_any(source, **options)
    original = None if reference is None else load_any(reference, **options)[0]
    tokenizer = load_tokenizer(source, reference)
    note(f"evaluating on {text}")
    result = evaluate_model(
        model,
        texts,
        tokenizer,
        reference=original,
        window=window,
        max_tokens=max_tokens,
        last_word=last_word,
        progress=show_progress(),
    )
    return {
        "model": source,
        "quantised": quantised,
        "reference": reference,
        "text": text,
        "window": window,
        "result": result.to_dict(),
    }


def render_evaluate(document: Document) -> Table:
    result = document["result"]
    table = Table(title=f"{document['model']} on {document['text']}", title_justify="left")
    table.add_column("")
    table.add_column("value", justify="right")
    table.add_column("standard error", justify="right")
    table.add_row("tokens scored", f"{result['tokens']}", "")
    table.add_row("perplexity", f"{result['perplexity']:.4f}", "")
    table.add_row("nats per token", f"{result['nll']:.4f}", f"{result['nll_stderr']:.4f}")
    if document["reference"] is not None:
        table.add_row(
            "more nats than the reference",
            f"{result['delta_nll']:+.4f}",
            f"{result['delta_nll_stderr']:.4f}",
        )
        table.add_row(
            "KL divergence from it", f"{result['mean_kl']:.5f}", f"{result['kl_stderr']:.5f}"
        )
        table.add_row("same most probable token", f"{result['top1_agreement']:.2%}", "")
    if result["last_word_accuracy"] is not None:
        table.add_row("last words right", f"{result['last_word_accuracy']:.2%}", "")
    table.add_row("seconds", f"{result['seconds']:.1f}", "")
    return table


# --- generate -------------------------------------------------------------------------------------


def generate(
    source: str, prompt: str, *, max_new_tokens: int, chat: bool, dtype: str, device: str
) -> Document:
    """`smoothquant-kernels generate`."""
    model, quantised = load_any(source, dtype=dtype, device=device, causal="generate")
    tokenizer = load_tokenizer(source)
    answer = complete(model, tokenizer, prompt, max_new_tokens=max_new_tokens, chat=chat)
    return {"model": source, "quantised": quantised, "prompt": prompt, "chat": chat, **answer}


def complete(
    model: Any,
    tokenizer: Any,
    prompt: str,
    *,
    max_new_tokens: int,
    chat: bool = False,
) -> Document:
    """Continues a prompt greedily; the text, the number of tokens and the time."""
    from transformers import GenerationConfig

    if chat:
        if not getattr(tokenizer, "chat_template", None):
            raise SmoothQuantError("this model has no chat template; leave out --chat.")
        messages = [{"role": "user", "content": prompt}]
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    # A chat template writes the special tokens itself.
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=not chat)["input_ids"]
    if not ids.shape[1]:
        raise SmoothQuantError("the prompt is empty; give some text to continue.")
    positions = getattr(model.config, "max_position_embeddings", None)
    if isinstance(positions, int) and ids.shape[1] + max_new_tokens > positions:
        raise SmoothQuantError(
            f"the prompt of {ids.shape[1]} tokens and {max_new_tokens} new ones exceed the "
            f"{positions} positions of the model; ask for fewer."
        )
    check_vocabulary(model.config, int(ids.max()))
    stop = getattr(model.generation_config, "eos_token_id", None) or tokenizer.eos_token_id
    # A configuration of our own: that of the model may ask for sampling or penalties.
    settings: Any = GenerationConfig  # its constructor carries no annotations
    greedy = settings(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=stop,
        pad_token_id=stop[0] if isinstance(stop, list) else stop,
    )
    ids = ids.to(model_device(model))
    begin = time.perf_counter()
    with evaluating(model), quiet_stderr():
        output = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=greedy
        )
    seconds = time.perf_counter() - begin
    new = output[0, ids.shape[1] :]
    # Many tokenizers drop the space before the first token that they decode, so decode the whole.
    whole = tokenizer.decode(output[0], skip_special_tokens=True)
    start = tokenizer.decode(ids[0], skip_special_tokens=True)
    text = whole[len(start) :] if whole.startswith(start) else tokenizer.decode(new)
    return {
        "text": text.strip() if chat else text,
        "new_tokens": len(new),
        "seconds": seconds,
    }


def render_generate(document: Document) -> str:
    # Plain text, not wrapped: it is for copying and for pipes.
    return str(document["text"] if document["chat"] else document["prompt"] + document["text"])
