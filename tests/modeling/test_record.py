"""Records of the changes to a model: files of an earlier release, reasons, and keys that users add."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from smoothquant_kernels import SmoothQuantConfig, quantize_model, smooth_and_quantize, smooth_lm
from smoothquant_kernels.checkpoint.manifest import MANIFEST, read_manifest
from smoothquant_kernels.modeling.changes import Changes
from smoothquant_kernels.modeling.record import (
    LayerRecord,
    ModelRecord,
    Reason,
    SkippedLayer,
    info_of,
)
from tests.support.command_line import Result
from tests.support.models import make_model, token_batches

DATA = Path(__file__).parent / "data"
WRITTEN = sorted(DATA.glob("*.info.json"))


def read(name: str) -> Any:
    return json.loads((DATA / f"{name}.info.json").read_text())


def test_all_files_of_the_earlier_release_are_found() -> None:
    assert len(WRITTEN) == 7


@pytest.mark.parametrize("path", WRITTEN, ids=lambda path: path.name.partition(".")[0])
def test_a_file_of_an_earlier_release_is_kept_byte_for_byte(path: Path) -> None:
    text = path.read_text()
    record = ModelRecord.from_dict(json.loads(text))
    assert json.dumps(record.to_dict(), indent=1) + "\n" == text
    assert not record.more and not any(layer.more for layer in record.layers)


@pytest.mark.parametrize("path", WRITTEN, ids=lambda path: path.name.partition(".")[0])
def test_every_sentence_of_an_earlier_release_has_its_reason(path: Path) -> None:
    record = ModelRecord.from_dict(json.loads(path.read_text()))
    for entry in (*record.layers, *record.skipped):
        assert Reason.of(entry.reason) is not None, entry.reason


def test_a_manifest_of_an_earlier_release_is_inspected_byte_for_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights are zeros of the right shapes, because `inspect` reads only their headers."""
    folder = tmp_path / "gpt2"
    folder.mkdir()
    (folder / MANIFEST).write_bytes((DATA / "gpt2.manifest.json").read_bytes())
    manifest = read_manifest(folder)
    for name in manifest.files:
        (folder / name).touch()
    zeros = {
        name: torch.zeros(entry["shape"], dtype=getattr(torch, entry["dtype"]))
        for name, entry in manifest.tensors.items()
    }
    save_file(zeros, folder / "smoothquant.safetensors")
    monkeypatch.chdir(tmp_path)
    result = Result("inspect", "gpt2", "--json")
    assert result.code == 0, result.err
    assert result.out == (DATA / "gpt2.inspect.json").read_text()


def shape(value: Any) -> Any:
    """The keys in order and the types of their values. Of a list, each kind of entry counts once."""
    if isinstance(value, dict):
        return [(key, shape(entry)) for key, entry in value.items()]
    if isinstance(value, list):
        return sorted({repr(shape(entry)) for entry in value})
    return type(value).__name__


@pytest.mark.parametrize("name", ["smoothed", "llama_static", "never_smoothed"])
def test_new_records_have_the_keys_of_an_earlier_release(name: str) -> None:
    model, data = make_model("llama"), token_batches()
    if name == "smoothed":
        smooth_lm(model, data, progress=False)
    elif name == "never_smoothed":
        quantize_model(model, config=SmoothQuantConfig(skip=("*.mlp.*",)))
    else:
        config = SmoothQuantConfig(
            activation_scheme="static", skip=("*.o_proj",), alphas={"*.down_proj": 0.5}
        )
        smooth_and_quantize(model, data, config, progress=False)
    got, expected = info_of(model), read(name)
    assert json.loads(json.dumps(got)) == got  # plain values, no tuple and no enum
    for layer in got["layers"]:
        assert layer.pop("rotation") in (32, 8)  # which an earlier release did not have
    new = ("rotation", "rotations", "activation_norm", "weight_norm", "weight_rounding")
    new += ("formats", "awq", "outliers", "outlier_threshold", "outlier_layers")
    for setting in (*new, "quantize_head"):
        del got["config"][setting]
    for layer in (*got["layers"], *expected["layers"]):
        if "alpha" in layer:
            layer["alpha"] = 0.5  # which layers profit from smoothing depends on the numbers
    assert shape(got) == shape(expected)


# --- reasons ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reason", Reason)
def test_a_reason_is_recognized_by_its_sentence(reason: Reason) -> None:
    places = reason.value.count("{")
    numbers = 0.25 if reason is Reason.NO_GAIN else "model.layers.0.mlp"
    assert Reason.of(reason(*[numbers] * places)) is reason


def test_sentences_of_other_releases_have_no_reason() -> None:
    assert Reason.of("") is None
    assert Reason.of("the moon was full") is None
    assert not SkippedLayer("a", "the moon was full").found_by_running


def test_a_skip_pattern_that_contains_a_reason_stays_a_pattern() -> None:
    assert Reason.of(Reason.SKIP_PATTERN(f"x: {Reason.SELECTS('y')}")) is Reason.SKIP_PATTERN


def test_a_recorded_reason_keeps_a_layer_in_float() -> None:
    """Only the recorded entry keeps this layer in float. A new run would not find the reason."""
    for reason, quantized in ((Reason.SELECTS("aten.topk reads its output"), 13), ("?", 14)):
        model = make_model("llama")
        smooth_lm(model, token_batches(), progress=False)
        name = "model.layers.0.mlp.up_proj"
        info_of(model)["skipped"].append({"name": name, "reason": reason})
        quantize_model(model)
        record = ModelRecord.of(model)
        assert len(record.layers) == quantized
        assert (SkippedLayer(name, reason) in record.skipped) == (quantized == 13)


# --- on a model -------------------------------------------------------------------------------------------------------


def test_a_model_without_a_record_has_an_empty_one() -> None:
    assert ModelRecord.of(nn.Linear(2, 2)) == ModelRecord()
    assert info_of(nn.Linear(2, 2)) == {}


def test_unknown_keys_of_the_record_and_its_layers_are_kept() -> None:
    info = read("llama")
    info["later"] = {"a": [1]}
    info["layers"][0]["note"] = "mine"
    record = ModelRecord.from_dict(info)
    assert record.to_dict() == info
    assert record.described[info["layers"][0]["name"]].more == {"note": "mine"}


def test_an_attached_record_is_removed_after_a_failure() -> None:
    model = nn.Linear(2, 2)
    record = ModelRecord(
        layers=(LayerRecord("a", group=("a",)),), skipped=(SkippedLayer("b", "?"),)
    )
    with pytest.raises(KeyError), Changes() as changes:
        record.attach(model, changes)
        assert ModelRecord.of(model) == record
        raise KeyError
    assert ModelRecord.of(model) == ModelRecord()
    record.attach(model)
    assert ModelRecord.of(model) == record and type(model.smoothquant_info) is dict


def test_unknown_keys_survive_a_round_trip() -> None:
    info = {
        "config": {},
        "layers": [],
        "skipped": [],
        "verification": {"relative_change": 0.5, "bit_exact": False, "mine": 1},
        "theirs": [2],
    }
    assert ModelRecord.from_dict(info).to_dict() == info
    assert ModelRecord.from_dict({"layers": [{"name": "a", "group": None}]}).layers[0].group == ()
