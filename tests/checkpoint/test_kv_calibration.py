"""Checkpoints keep the calibration of an int8 cache, and folders without one load as before."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load, save_file
from torch import nn

from smoothquant_kernels import (
    SmoothQuantConfig,
    SmoothQuantError,
    calibrate_kv_cache,
    load_quantized,
    register_transformers,
    save_quantized,
)
from smoothquant_kernels.checkpoint import kv_calibration
from smoothquant_kernels.checkpoint.kv_calibration import KV_FILE, read_calibration
from smoothquant_kernels.kv_cache.calibration import KVCalibration, calibration_of
from smoothquant_kernels.storage.safetensors import write_safetensors
from tests.support.checkpoints import IDS, assert_same_bits, contents, logits, quantized

FORMATS: dict[str, dict[str, Any]] = {
    "native": {},
    "compressed-tensors": {"folding": "only", "rotation": "none"},
}


@pytest.fixture(scope="module")
def model() -> Any:
    made = quantized()
    calibrate_kv_cache(made, [IDS], progress=False)
    return made


def assert_same(found: KVCalibration | None, model: nn.Module) -> None:
    expected = calibration_of(model)
    assert found is not None and expected is not None
    assert (found.tokens, list(found.layers)) == (expected.tokens, list(expected.layers))
    for number, maxima in expected.layers.items():
        for name in "qkv":
            assert torch.equal(getattr(found.layers[number], name), getattr(maxima, name))


@pytest.mark.parametrize("format", FORMATS)
def test_the_folder_keeps_the_calibration(format: str, tmp_path: Path) -> None:
    model = quantized(scheme="per_token", **FORMATS[format])
    calibrate_kv_cache(model, [IDS], progress=False)
    folder = save_quantized(model, tmp_path / "model", format=format)
    # vLLM and others read every safetensors file beside config.json as weights.
    assert KV_FILE not in {p.name for p in folder.glob("*.safetensors")}
    loaded = load_quantized(folder)
    assert_same(calibration_of(loaded), model)
    assert_same(loaded.smoothquant_kv_calibration, model)  # type: ignore[arg-type]
    assert_same_bits(logits(loaded), logits(model))
    again = save_quantized(loaded, tmp_path / "again", format=format)
    assert (again / KV_FILE).read_bytes() == (folder / KV_FILE).read_bytes()


def test_a_folder_without_one_is_as_before(tmp_path: Path) -> None:
    folder = save_quantized(quantized(), tmp_path / "model")
    assert not (folder / "kv_cache").exists()
    loaded = load_quantized(folder)
    assert calibration_of(loaded) is None
    assert not hasattr(loaded, "smoothquant_kv_calibration")
    # A file that the manifest does not list is not trusted.
    (folder / "kv_cache").mkdir()
    (folder / KV_FILE).write_bytes(b"anything")
    assert calibration_of(load_quantized(folder)) is None


def test_the_manifest_has_no_new_key(model: Any, tmp_path: Path) -> None:
    """So that earlier releases, which refuse unknown keys, load the folder."""
    with_it = save_quantized(model, tmp_path / "with")
    without = save_quantized(quantized(), tmp_path / "without")
    one, two = (json.loads((f / "smoothquant.json").read_text()) for f in (with_it, without))
    assert one.keys() == two.keys()
    assert one["files"].keys() - two["files"].keys() == {KV_FILE}


def test_from_pretrained_keeps_it_without_a_warning(
    model: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    register_transformers()
    folder = save_quantized(model, tmp_path / "model")
    transformers.utils.logging.enable_propagation()
    try:
        loaded = transformers.AutoModelForCausalLM.from_pretrained(folder)
    finally:
        transformers.utils.logging.disable_propagation()
    assert not [r for r in caplog.records if r.levelname == "WARNING"], caplog.text
    assert_same(calibration_of(loaded), model)
    assert_same_bits(logits(loaded), logits(model))


def test_an_interrupted_write_leaves_nothing(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = save_quantized(model, tmp_path / "model")
    before = contents(target)

    def fail(path: Path, *_: Any) -> Any:
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(kv_calibration, "write_safetensors", fail)
    with pytest.raises(KeyboardInterrupt):
        save_quantized(model, target, overwrite=True)
    assert contents(target) == before
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_changed_file_is_found(model: Any, tmp_path: Path) -> None:
    folder = save_quantized(model, tmp_path / "model")
    data = bytearray((folder / KV_FILE).read_bytes())
    data[-1] ^= 64
    (folder / KV_FILE).write_bytes(data)
    with pytest.raises(SmoothQuantError, match=r"calibration\.safetensors is not what was saved"):
        load_quantized(folder)
    (folder / KV_FILE).unlink()
    with pytest.raises(SmoothQuantError, match=f"{KV_FILE} is missing: copy it again"):
        load_quantized(folder)


def _renamed(t: dict[str, Any]) -> None:
    t["layers.0.x"] = t.pop("layers.0.q")


def _negative(t: dict[str, Any]) -> None:
    t["layers.0.q"][0, 0] = -1.0


def _nan(t: dict[str, Any]) -> None:
    t["layers.1.v"][0, 0] = torch.nan


def _half(t: dict[str, Any]) -> None:
    t["layers.1.v"] = t["layers.1.v"].half()


def _narrow(t: dict[str, Any]) -> None:
    t["layers.1.q"] = t["layers.1.q"][:, 1:].contiguous()


def _flat(t: dict[str, Any]) -> None:
    t["layers.1.q"] = t["layers.1.q"].flatten()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_renamed, "layers.0.x is no tensor of a calibration"),
        (lambda t: t.pop("layers.0.v"), "'v'"),
        (_negative, "layers.0.q has a value that is no magnitude"),
        (_nan, "layers.1.v has a value that is no magnitude"),
        (_half, "layers.1.v is torch.float16"),
        (_narrow, "q, k and v of layer 1 do not fit each other"),
        (_flat, r"layers.1.q is torch.float32 \[16\]"),
        (lambda t: t.clear(), "it has no layer"),
        (lambda t: t.update({"weights": torch.ones(1, 1)}), "is damaged"),
    ],
)
def test_a_file_that_makes_no_sense_is_refused(
    change: Any, message: str, model: Any, tmp_path: Path
) -> None:
    """Digests do not prove who wrote a folder."""
    folder = save_quantized(model, tmp_path / "model")
    tensors = load((folder / KV_FILE).read_bytes())
    change(tensors)
    write_safetensors(folder / KV_FILE, tensors, {"content": kv_calibration._FORMAT, "tokens": "3"})
    with pytest.raises(SmoothQuantError, match=message):
        read_calibration(folder)
    with pytest.raises(SmoothQuantError, match="copy it again"):
        load_quantized(folder, verify=False)


def test_files_of_other_formats(model: Any, tmp_path: Path) -> None:
    folder = save_quantized(model, tmp_path / "model")
    tensors = load((folder / KV_FILE).read_bytes())
    save_file(tensors, folder / KV_FILE)
    with pytest.raises(SmoothQuantError, match="is in the format None and this release reads"):
        read_calibration(folder)
    write_safetensors(folder / KV_FILE, tensors, {"content": kv_calibration._FORMAT, "tokens": "x"})
    with pytest.raises(SmoothQuantError, match="is damaged"):
        read_calibration(folder)
    (folder / KV_FILE).write_bytes(b"no safetensors")
    with pytest.raises(SmoothQuantError, match="cannot be read"):
        read_calibration(folder)


def test_the_model_that_was_given_stays_as_it_was(model: Any, tmp_path: Path) -> None:
    folder = save_quantized(model, tmp_path / "model")
    (folder / KV_FILE).write_bytes(b"no safetensors")
    config = transformers.AutoConfig.from_pretrained(folder)
    del config.quantization_config
    given = transformers.LlamaForCausalLM(config)
    with pytest.raises(SmoothQuantError, match="cannot be read"):
        load_quantized(folder, model=given, verify=False)
    assert calibration_of(given) is None
    assert type(given.model.layers[0].mlp.up_proj) is nn.Linear


def test_a_config_of_weights_has_no_part_in_it() -> None:
    assert "kv" not in " ".join(vars(SmoothQuantConfig()))
