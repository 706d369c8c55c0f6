"""Damaged, forged and foreign checkpoints are refused in one sentence, and their code never runs."""

from __future__ import annotations

import ast
import hashlib
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import smoothquant_kernels
from smoothquant_kernels.checkpoint.load import load_quantized
from smoothquant_kernels.checkpoint.manifest import MANIFEST
from tests.support.checkpoints import (
    WEIGHTS,
    llama,
    manifest_of,
    refusal,
    rewrite,
)

# ------------------------------------------------------------------------------ folders refused


def test_a_folder_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    assert "there is no folder" in refusal(lambda: load_quantized(tmp_path / "none"))
    message = refusal(lambda: load_quantized(tmp_path))
    assert f"is not a checkpoint of this package, it has no {MANIFEST}" in message
    for text, expected in (("{}", "not written by this package"), ("{", "not valid JSON")):
        (tmp_path / MANIFEST).write_text(text)
        assert expected in refusal(lambda: load_quantized(tmp_path))


@pytest.mark.parametrize("name", [WEIGHTS, "config.json", "generation_config.json"])
def test_a_damaged_file_is_refused(name: str, saved: Path) -> None:
    path = saved / name
    data = path.read_bytes()
    for position in (0, len(data) // 2, len(data) - 1):
        flipped = bytearray(data)
        flipped[position] ^= 1
        path.write_bytes(flipped)
        message = refusal(lambda: load_quantized(saved))
        assert f"{path} is not what was saved (its SHA-256 differs): copy it again" in message
    path.write_bytes(data[:-1])
    message = refusal(lambda: load_quantized(saved))
    assert f"{path} has {len(data) - 1} bytes and was saved with {len(data)}" in message
    path.unlink()
    assert f"is incomplete, {name} is missing" in refusal(lambda: load_quantized(saved))
    path.write_bytes(data)
    load_quantized(saved)


def test_loading_without_verification(saved: Path, model: nn.Module) -> None:
    path = saved / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "max_new_tokens": 3}))
    loaded: Any = load_quantized(saved, verify=False)
    assert loaded.generation_config.max_new_tokens == 3
    data = (saved / WEIGHTS).read_bytes()
    (saved / WEIGHTS).write_bytes(data[:-1])
    message = refusal(lambda: load_quantized(saved, verify=False))
    assert f"{saved / WEIGHTS} cannot be read" in message
    (saved / WEIGHTS).write_bytes(data)
    for text, expected in (
        ("[]", "cannot be read"),
        ('{"architectures": ["OPTForCausalLM"]}', "is for ['OPTForCausalLM'] and the weights are"),
        (
            '{"architectures": ["LlamaForCausalLM"], "hidden_size": "x"}',
            "config.json does not make a LlamaForCausalLM",
        ),
    ):
        (saved / "config.json").write_text(text)
        assert expected in refusal(lambda: load_quantized(saved, verify=False))


def test_an_altered_manifest_is_refused(saved: Path) -> None:
    text = (saved / MANIFEST).read_text()
    for old, new in (
        ('"alpha": 0.75', '"alpha": 0.5'),
        ('"format_version": 1', '"format_version": 0'),
    ):
        assert old in text
        (saved / MANIFEST).write_text(text.replace(old, new))
        message = refusal(lambda: load_quantized(saved))
        assert f"{saved / MANIFEST} is damaged or was altered" in message
    # Spacing and order do not matter.
    values = json.loads(text)
    (saved / MANIFEST).write_text(json.dumps(dict(reversed(values.items()))))
    load_quantized(saved)


def test_a_newer_format_is_refused(saved: Path) -> None:
    values = {**manifest_of(saved), "format_version": 2, "something": "new"}
    (saved / MANIFEST).write_text(json.dumps(values))
    message = refusal(lambda: load_quantized(saved))
    assert "is in format 2 and this release reads up to 1" in message
    assert "pip install --upgrade smoothquant-kernels" in message


FIRST = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize("path", ["../secret", "/etc/passwd", "a/../../b", "..\\secret", "."])
def test_a_path_that_leaves_the_folder_is_refused(path: str, saved: Path) -> None:
    (saved.parent / "secret").write_text("x")
    entry = {"size": 1, "sha256": hashlib.sha256(b"x").hexdigest()}
    rewrite(saved, lambda m: m["files"].update({path: entry}))
    message = refusal(lambda: load_quantized(saved))
    assert f"the path {path!r} leaves the folder" in message


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda m: m.pop("tied"), "the entries of the manifest are not the expected ones"),
        (lambda m: m.update(tied=[]), "tied of the manifest is of the wrong type"),
        (lambda m: m.update(tied={"a": "b"}), "a refers to nothing"),
        (lambda m: m.update(tied={"a": 1}), "a name is not a string"),
        (lambda m: m.update(non_persistent=["a"]), "non_persistent names no tensor"),
        (lambda m: m["modules"].update({FIRST: 3}), "the arguments of a module are not an object"),
        (lambda m: m["files"][WEIGHTS].update(size=True), "size of smoothquant.safetensors is of"),
        (lambda m: m["tensors"][f"{FIRST}.w_q"].update(shape=[-1]), "the shape of model.layers.0"),
        (lambda m: m["tensors"][f"{FIRST}.w_q"].update(file="x"), "the file of model.layers.0"),
        (lambda m: m["tensors"][f"{FIRST}.w_q"].update(shape=[1]), "has shape [32, 32], not [1]"),
        (lambda m: m["tensors"][f"{FIRST}.w_q"].update(dtype="int4"), "is torch.int8, not int4"),
        (lambda m: m["tensors"][f"{FIRST}.w_scale"].update(dtype="float16"), "not float16"),
        (lambda m: m["tensors"].pop(f"{FIRST}.w_q"), f"{FIRST}.w_q is not in the checkpoint"),
        (lambda m: m["modules"][FIRST].update(extra=1), f"arguments of {FIRST} are not understood"),
        (lambda m: m["modules"][FIRST].update({"class": "Linear"}), "are not understood"),
        (lambda m: m["modules"][FIRST].update(in_features=0), "in_features must be in [1,"),
        (lambda m: m["modules"][FIRST].update(in_features=64), "maps 32 to 32 features, not (64"),
        (lambda m: m["modules"][FIRST].update(smooth=True), "inv_smooth is not in the checkpoint"),
        (
            lambda m: m["modules"].update(x=m["modules"].pop(FIRST)),
            "it has no module x (and ",
        ),
        (lambda m: m["model"].update(name="OPTForCausalLM"), "is for ['LlamaForCausalLM'] and"),
    ],
)
def test_a_forged_manifest_is_refused(
    change: Callable[[dict[str, Any]], object], expected: str, saved: Path
) -> None:
    rewrite(saved, change)
    assert expected in refusal(lambda: load_quantized(saved))


def retype(data: dict[str, torch.Tensor]) -> None:
    data[f"{FIRST}.w_q"] = data[f"{FIRST}.w_q"].short()


def not_a_number(data: dict[str, torch.Tensor]) -> None:
    data[f"{FIRST}.w_scale"][3] = float("nan")


def negative(data: dict[str, torch.Tensor]) -> None:
    data[f"{FIRST}.x_scale"].neg_()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda d: d.pop(f"{FIRST}.w_q"), f"does not match the manifest at {FIRST}.w_q"),
        (lambda d: d.update(more=torch.zeros(1)), "does not match the manifest at more"),
        (retype, f"{FIRST}.w_q is int16 [32, 32] in {WEIGHTS} and int8 [32, 32] in the manifest"),
        (not_a_number, f"{FIRST}.w_scale has a value that is NaN, infinite or negative"),
        (negative, f"{FIRST}.x_scale has a value that is NaN, infinite or not positive"),
    ],
)
def test_forged_tensors_are_refused(
    change: Callable[[dict[str, torch.Tensor]], object], expected: str, saved: Path
) -> None:
    data = {n: t.clone() for n, t in load_file(saved / WEIGHTS).items()}
    change(data)
    save_file(data, saved / WEIGHTS)
    rewrite(saved, lambda m: None)
    skeleton = llama()
    before = str(skeleton)
    for given in (None, skeleton):
        assert expected in refusal(lambda given=given: load_quantized(saved, model=given))
    assert str(skeleton) == before


def test_unusable_devices_are_refused(saved: Path) -> None:
    assert "meta device" in refusal(lambda: load_quantized(saved, device="meta"))
    assert "'nonsense' cannot be used" in refusal(lambda: load_quantized(saved, device="nonsense"))
    if not torch.cuda.is_available():
        assert "'cuda' cannot be used" in refusal(lambda: load_quantized(saved, device="cuda"))


# ---------------------------------------------------------------------------------- no foreign code


def test_no_code_of_the_folder_is_run(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even with valid digests, neither pickles nor modules that config.json names are loaded."""
    config = json.loads((saved / "config.json").read_text())
    evil = "someone/kernel"
    for key in ("attn_implementation", "_attn_implementation", "_attn_implementation_internal"):
        config[key] = config["experts_implementation"] = evil
    config["auto_map"] = {"AutoModelForCausalLM": "evil.Model", "AutoConfig": "evil.Config"}
    (saved / "config.json").write_text(json.dumps(config))
    marker = saved / "ran"
    (saved / "evil.py").write_text(f"open({str(marker)!r}, 'w')\nraise SystemExit\n")
    rewrite(saved, lambda m: m["model"].update(attention=evil))

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("pickle was used")

    for owner, name in (
        (pickle, "load"),
        (pickle, "loads"),
        (pickle, "Unpickler"),
        (torch, "load"),
    ):
        monkeypatch.setattr(owner, name, refuse)
    loaded: Any = load_quantized(saved)
    assert loaded.config._attn_implementation == "sdpa"
    assert not marker.exists()


@pytest.mark.parametrize("name", ["Trainer", "PreTrainedModel", "utils", "__loader__", "No Such"])
def test_a_name_that_is_not_a_model_class_is_refused(name: str, saved: Path) -> None:
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps({**config, "architectures": [name]}))
    rewrite(saved, lambda m: m["model"].update(name=name))
    message = refusal(lambda: load_quantized(saved))
    assert f"has no model class {name}" in message or f"does not make a {name}" in message


def test_the_source_has_no_pickle() -> None:
    package = Path(smoothquant_kernels.__file__).parent
    for file in (*package.glob("checkpoint/*.py"), *package.glob("storage/*.py")):
        tree = ast.parse(file.read_text())
        imported = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
        imported |= {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
        assert not imported & {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}
        called = {n.func.id for n in ast.walk(tree)
                  if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)}  # fmt: skip
        assert not called & {"eval", "exec", "__import__"}
        assert "torch.load(" not in file.read_text()
