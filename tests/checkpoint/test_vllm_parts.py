"""Which modules make up a layer of a vLLM model, without vLLM. tests/vllm has the rest (`make test-vllm`)."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest

from smoothquant_kernels import SmoothQuantError, W8A8Linear
from smoothquant_kernels.checkpoint import vllm as plugin
from smoothquant_kernels.checkpoint.vllm.parts import (
    check_shard,
    modules_in,
    modules_of,
    parts_of,
)
from smoothquant_kernels.nn.kinds import describe

ARGUMENTS = describe(W8A8Linear(64, 32, rotation=16, device="meta"))
PACKED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
QKV = {f"layers.0.{part}": ARGUMENTS for part in PACKED["qkv_proj"]}


def test_a_merged_layer_has_its_parts_in_vllms_order() -> None:
    modules = dict(reversed(QKV.items()))
    assert list(parts_of("layers.0.qkv_proj", modules, PACKED)) == list(QKV)


def test_layers_by_name() -> None:
    modules = {"lm_head": ARGUMENTS, "layers.0.qkv_proj": ARGUMENTS}
    assert list(parts_of("lm_head", modules, PACKED)) == ["lm_head"]
    assert list(parts_of("layers.0.qkv_proj", modules, PACKED)) == ["layers.0.qkv_proj"]
    assert parts_of("layers.1.qkv_proj", modules, PACKED) == {}
    assert parts_of("", modules, PACKED) == {}


def test_a_merged_layer_with_a_part_in_float_is_refused() -> None:
    modules = {name: ARGUMENTS for name in list(QKV)[:2]}
    with pytest.raises(SmoothQuantError, match=r"and layers\.0\.v_proj is in float: quantize all"):
        parts_of("layers.0.qkv_proj", modules, PACKED)


@pytest.mark.parametrize("changed", [{"class": "W4A8Linear"}, {"rotation": 3}])
def test_unknown_arguments_are_refused(changed: dict[str, Any]) -> None:
    with pytest.raises(SmoothQuantError, match="o_proj"):
        parts_of("o_proj", {"o_proj": {**ARGUMENTS, **changed}}, {})


def test_a_rotation_must_not_cross_processes() -> None:
    layer = W8A8Linear(96, 32, rotation=32, device="meta")
    check_shard("o_proj", layer, 32)
    for k, own in ((48, "16"), (33, "'none'")):
        message = rf"o_proj rotates groups of 32 channels, .* {k} of its 96, .*'o_proj': {own}}}"
        with pytest.raises(SmoothQuantError, match=message):
            check_shard("o_proj", layer, k)


def test_modules_of_config_json() -> None:
    values = {"modules": {"a": ARGUMENTS}, "shared_modules": {"b": "a"}}
    assert modules_in(values) == {"a": ARGUMENTS, "b": ARGUMENTS}
    assert modules_in({"quant_method": "smoothquant_kernels"}) is None
    for wrong in ({"modules": []}, {"modules": {}, "shared_modules": {"b": "a"}}):
        with pytest.raises(SmoothQuantError, match="save"):
            modules_in(wrong)


def test_modules_of_a_folder(saved: Path) -> None:
    modules = modules_of(str(saved))
    assert modules["model.layers.0.self_attn.q_proj"]["class"] == "W8A8Linear"


def test_a_name_without_a_folder(tmp_path: Path) -> None:
    with pytest.raises(SmoothQuantError, match=r"config\.json of someone/model does not list"):
        modules_of("someone/model")


def test_a_vllm_that_lacks_a_class_is_told_and_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm.model_executor.layers.linear", None)
    monkeypatch.delitem(sys.modules, f"{plugin.__name__}.method", raising=False)
    with pytest.warns(UserWarning, match=r"cannot serve checkpoints .*install a vLLM .* 0\.32\.0"):
        plugin.register()


def test_the_entry_point_names_the_plugin() -> None:
    own = [p for p in entry_points(group="vllm.general_plugins") if p.name == "smoothquant_kernels"]
    if not own:
        pytest.skip("the package was installed before it had the plugin: pip install -e . again")
    assert own[0].load() is plugin.register


def test_the_plugin_imports_vllm_only_to_register() -> None:
    code = (
        "import sys, smoothquant_kernels.checkpoint.vllm.parts\n"
        "assert not {'vllm', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
