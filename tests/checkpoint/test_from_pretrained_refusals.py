"""What `from_pretrained` refuses: altered and incomplete folders, those of earlier releases, a missing package."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers
from safetensors.torch import load_file, save_file

from smoothquant_kernels import (
    load_quantized,
    register_transformers,
    save_quantized,
)
from smoothquant_kernels.checkpoint.manifest import INDEX, MANIFEST
from smoothquant_kernels.storage.digests import digest, file_entry
from tests.support.checkpoints import (
    KINDS,
    RELEASE_4,
    assert_same_bits,
    auto,
    llama,
    logits,
    quantized,
    refusal,
    write,
)

UP, OUT = "model.layers.0.mlp.up_proj", "model.layers.1.self_attn.o_proj"


@pytest.fixture(autouse=True)
def registered() -> None:
    register_transformers()


@pytest.fixture(scope="module")
def model() -> Any:
    return quantized(lambda: llama(tie_word_embeddings=True), "per_token")


@pytest.fixture(params=KINDS)
def folder(request: Any, model: Any, tmp_path: Path) -> Path:
    return write(model, tmp_path / "saved", request.param)


@pytest.fixture
def plain(model: Any, tmp_path: Path) -> Path:
    """A folder of save_pretrained."""
    return write(model, tmp_path / "plain", "save_pretrained")


def as_an_older_release_wrote(folder: Path) -> None:
    """quantization_config had only the method, and there was no index."""
    values = json.loads((folder / "config.json").read_text())
    values["quantization_config"] = {"quant_method": "smoothquant_kernels"}
    (folder / "config.json").write_text(json.dumps(values))
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["files"]["config.json"] = file_entry(folder / "config.json")
    if (folder / INDEX).exists():
        (folder / INDEX).unlink()
        del manifest["files"][INDEX]
    del manifest["digest"]
    (folder / MANIFEST).write_text(json.dumps({**manifest, "digest": digest(manifest)}))


def test_folders_of_an_earlier_release(model: Any, tmp_path: Path) -> None:
    one = save_quantized(model, tmp_path / "one")
    as_an_older_release_wrote(one)
    for loaded in (auto(one), load_quantized(one)):
        assert_same_bits(logits(loaded), logits(model))
    message = refusal(lambda: transformers.LlamaForCausalLM.from_pretrained(one))
    assert "load it by an Auto class" in message
    shards = save_quantized(model, tmp_path / "shards", max_shard_bytes=20_000)
    as_an_older_release_wrote(shards)
    assert_same_bits(logits(load_quantized(shards)), logits(model))
    assert "weight files of this checkpoint" in refusal(lambda: auto(shards))


def test_a_folder_of_save_quantized_is_verified(model: Any, tmp_path: Path) -> None:
    folder = save_quantized(model, tmp_path / "saved")
    with (folder / "smoothquant.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x01")
    assert "its SHA-256 differs" in refusal(lambda: auto(folder))
    (folder / MANIFEST).unlink()
    assert f"incomplete, {MANIFEST} is missing" in refusal(lambda: auto(folder))


def without(name: str) -> Callable[[dict[str, Any]], object]:
    return lambda tensors: tensors.pop(name)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (without(f"{UP}.w_q"), f"no int8 tensor {UP}.w_q"),
        (without(f"{UP}.w_scale"), f"no int8 tensor {UP}.w_scale"),
        (without("model.layers.1.self_attn.o_proj.inv_smooth"), "o_proj.inv_smooth"),
        (lambda t: t[f"{UP}.w_scale"].fill_(float("nan")), f"{UP}.w_scale has a value that is NaN"),
        (
            lambda t: t.update({f"{UP}.w_q": t[f"{UP}.w_q"].float()}),
            f"{UP}.w_q in the checkpoint is",
        ),
        (lambda t: t.update({f"{UP}.w_scale": t[f"{UP}.w_scale"].half()}), "w_scale in the check"),
    ],
)
def test_damaged_tensors(change: Callable[[Any], object], expected: str, plain: Path) -> None:
    tensors = load_file(plain / "model.safetensors")
    change(tensors)
    save_file(tensors, plain / "model.safetensors", metadata={"format": "pt"})
    assert expected in refusal(lambda: auto(plain))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda q: q.update(modules=[1]), "(the arguments of a module are not an object)"),
        (lambda q: q["modules"].update(a=5), "(the arguments of a module are not an object)"),
        (lambda q: q["modules"][UP].update(extra=1), f"arguments of {UP} are not understood"),
        (lambda q: q["modules"][UP].update(rotation=3), f"arguments of {UP} are not understood"),
        (lambda q: q["modules"][UP].update(in_features=64), "maps 32 to 88 features, not (64, 88)"),
        (lambda q: q["modules"].update(a=q["modules"][UP]), "it has no module a"),
        (
            lambda q: q["modules"][OUT].update(smooth=False),
            f"has {OUT}.inv_smooth, which its config",
        ),
        (lambda q: q["modules"].update({"model.norm": q["modules"][UP]}), "is a LlamaRMSNorm"),
        (lambda q: q.update(shared_modules={"a": "b"}), "(a refers to nothing)"),
        (lambda q: q.update(shared_modules={"a": 1}), "(a name is not a string)"),
        (lambda q: q.update(types={"a": "int8"}), "('int8' is not a floating-point type"),
        (lambda q: q.update(types=3), "smoothquant_info or types is not an object"),
        (lambda q: q.update(smoothquant_info=3), "smoothquant_info or types is not an object"),
        (lambda q: q.update(dtype=None), "(None is not a floating-point type"),
        (lambda q: q.update(weights="../x.safetensors"), "is not a name in its folder"),
        (lambda q: q.update(weights=["x"]), "is not a name in its folder"),
        (lambda q: q.pop("modules"), "it has no smoothquant.json"),
        (lambda q: q["modules"].pop(UP), f"has {UP}.w_scale, which its config.json does not"),
    ],
)
def test_altered_configurations(
    change: Callable[[Any], object], expected: str, plain: Path
) -> None:
    values = json.loads((plain / "config.json").read_text())
    change(values["quantization_config"])
    (plain / "config.json").write_text(json.dumps(values))
    assert expected in refusal(lambda: auto(plain))


def test_an_attention_that_would_fetch_code_is_not_used(plain: Path) -> None:
    values = json.loads((plain / "config.json").read_text())
    values["quantization_config"]["attention"] = "some/repository"
    (plain / "config.json").write_text(json.dumps(values))
    assert auto(plain).config._attn_implementation == "sdpa"


def test_a_tensor_of_another_shape(plain: Path) -> None:
    tensors = load_file(plain / "model.safetensors")
    tensors[f"{UP}.w_q"] = tensors[f"{UP}.w_q"][:5].clone()
    save_file(tensors, plain / "model.safetensors", metadata={"format": "pt"})
    if RELEASE_4:
        with pytest.raises(RuntimeError, match="size mismatch for w_q"):
            auto(plain)
    else:
        assert "w_q in the checkpoint is I8 [5, 32], not I8 [88, 32]" in refusal(
            lambda: auto(plain)
        )


def test_load_quantized_names_the_way(plain: Path) -> None:
    message = refusal(lambda: load_quantized(plain))
    assert "was written by save_pretrained: load it by from_pretrained" in message


SCRIPT = """
import sys, transformers
for folder in sys.argv[1:]:
    try:
        transformers.AutoModelForCausalLM.from_pretrained(folder)
    except (OSError, RuntimeError) as error:
        print("refused:", str(error).splitlines()[-1])
    else:
        sys.exit(f"{folder} was loaded")
assert "smoothquant_kernels" not in sys.modules
"""


def test_without_this_package_nothing_is_loaded(model: Any, tmp_path: Path) -> None:
    """transformers warns of an unknown method and goes on. It must fail then, rather than make random weights."""
    folders = [
        write(model, tmp_path / f"{kind}{limit}", kind, limit)
        for kind in KINDS
        for limit in (10**9, 20_000)
    ]
    # The commands of other tests may have silenced transformers.
    environment = {**os.environ, "TRANSFORMERS_VERBOSITY": "warning"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *map(str, folders)],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "got smoothquant_kernels" in done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("refused:")]
    assert ["no file named" in line for line in lines] == [True, True, False, False]
    assert all("size" in line for line in lines[2:])


def test_another_quantization_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="quantized with Config"):
        auto(folder, quantization_config=transformers.BitsAndBytesConfig(load_in_8bit=True))
