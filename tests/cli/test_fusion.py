"""`evaluate --optimize`, `generate --optimize` and `inspect --fusion`."""

from __future__ import annotations

import io
import shutil
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from torch import nn

from smoothquant_kernels import fusion_info, load_quantized
from smoothquant_kernels.cli import fused
from smoothquant_kernels.fusion import optimize
from smoothquant_kernels.fusion.record import FusedLayer
from tests.support import compressed_tensors
from tests.support.command_line import Result, refused


def test_evaluate_measures_the_optimized_model(
    checkpoint: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[nn.Module] = []
    own = optimize.attach_fusion
    monkeypatch.setattr(
        optimize, "attach_fusion", lambda model, layers: (seen.append(model), own(model, layers))
    )
    command = (
        "evaluate", checkpoint, "--reference", checkpoint, "--text", text, "--max-tokens", "256",
        "--device", "cpu", "--json",
    )  # fmt: skip
    plain, fused = Result(*command).json, Result(*command, "--optimize").json
    assert (plain["optimized"], fused["optimized"]) == (False, True)
    assert len(seen) == 1, "the reference is not optimized"
    assert plain["result"]["mean_kl"] == 0
    # The fused model rounds less, so that a few int8 values are one step away; the reference does not.
    assert abs(fused["result"]["nll"] - plain["result"]["nll"]) < 1e-3
    assert fused["result"]["mean_kl"] < 1e-4


def test_generate(checkpoint: Path) -> None:
    command = ("generate", checkpoint, "-p", "the cat", "--device", "cpu", "--json")
    plain, fused = Result(*command).json, Result(*command, "--optimize").json
    assert fused["optimized"] and not plain["optimized"]
    assert fused["new_tokens"] == plain["new_tokens"]


@pytest.mark.parametrize("command", [("evaluate",), ("generate", "-p", "the cat")])
def test_a_float_model_is_refused_before_it_is_loaded(
    tiny: Path, command: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "smoothquant_kernels.evaluation.models.load_model", lambda *_: pytest.fail("loaded")
    )
    said = refused(command[0], tiny, *command[1:], "--optimize")
    assert said == (
        f"--optimize needs a quantized model, and {tiny} is a float model: quantize it first, or leave out --optimize."
    )


NORM = "model.layers.*.input_layernorm"
Q, K, V = (f"model.layers.*.self_attn.{name}_proj" for name in "qkv")


def test_inspect_shows_what_is_fused(checkpoint: Path) -> None:
    plain = Result("inspect", checkpoint, "--json").json
    document = Result("inspect", checkpoint, "--fusion", "--json").json
    fusion = document.pop("fusion")
    assert document == plain
    layers = fusion_info(load_quantized(checkpoint, optimize=True))
    assert fusion["layers"] == [layer.to_dict() for layer in layers]
    groups = {group["layers"]: group for group in fusion["groups"]}
    assert len(groups) == len(fusion["groups"]) == 7
    assert groups[K] == {
        "layers": K, "count": 2, "producer": NORM, "kind": "rms_norm", "merged": [Q, K, V],
        "residual": False, "int8": False, "reason": "",
    }  # fmt: skip
    o, down = groups[K.replace("k_", "o_")], groups["model.layers.*.mlp.down_proj"]
    assert o["residual"] and o["producer"] == "" and o["reason"] == layers[3].reason
    assert down["residual"] and down["kind"] == "silu"

    shown = Result("inspect", checkpoint, "--fusion").out
    lines = shown[shown.index("What --optimize fuses") :].splitlines()
    (row,) = [line for line in lines if K in line]
    cells = [cell.strip() for cell in row.strip("│").split("│")]
    assert cells == [K, "2", f"rms_norm ({NORM})", "q_proj, v_proj", ""]
    (row,) = [line for line in lines if "self_attn.o_proj" in line and "no norm" in line]
    assert "yes" in row
    assert any("12 of 14 layers compute their norm" in line for line in lines)
    assert "fuses" not in Result("inspect", checkpoint).out


def test_inspect_shows_where_values_stay_int8() -> None:
    producer = "decoder.layers.*.activation_fn"
    layers = [
        FusedLayer(f"decoder.layers.{i}.fc2", producer.replace("*", str(i)), "relu", int8=True)
        for i in range(3)
    ]
    layers.append(FusedLayer("head", reason="not called on the sample"))
    document = {"groups": fused._groups(layers), "layers": [layer.to_dict() for layer in layers]}
    console = Console(width=124, record=True, file=io.StringIO())
    console.print(fused.render(document))
    shown = " ".join(console.export_text().split())
    assert f"decoder.layers.*.fc2 │ 3 │ relu ({producer}), in the GEMM" in shown
    assert "head │ 1 │ not called on the sample" in shown
    assert "3 of 4 layers compute their norm or activation, 0 share 0 GEMMs, 0 add" in shown


def test_inspect_loads_folders_of_other_tools(tmp_path: Path) -> None:
    config = compressed_tensors.quantization_config()
    folder = compressed_tensors.write(
        tmp_path / "q",
        compressed_tensors.llama(),
        lambda name: None if name == "lm_head" else ("per_token", "channel"),
        config,
    )
    groups = Result("inspect", folder, "--fusion", "--json").json["fusion"]["groups"]
    assert [Q, K, V] in [group["merged"] for group in groups]


@pytest.mark.parametrize("verify", [(), ("--verify",)])
def test_damaged_weights_are_named(
    checkpoint: Path, tmp_path: Path, verify: tuple[str, ...]
) -> None:
    folder = shutil.copytree(checkpoint, tmp_path / "q")
    weights = folder / "smoothquant.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert Result("inspect", folder).code == 0  # the headers are as they were
    result = Result("inspect", folder, "--fusion", *verify)
    assert (result.code, result.out) == (1 if verify else 2, "")
    assert str(weights) in result.err and "Traceback" not in result.err


def test_inspect_refuses_what_it_cannot_load(tiny: Path, tmp_path: Path) -> None:
    for folder in (tiny, tmp_path / "absent"):
        assert refused("inspect", folder, "--fusion") == refused("inspect", folder)


def test_a_model_that_cannot_be_fused_is_one_sentence(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: tuple[tuple[Any, ...], ...] = (
        ("inspect", checkpoint, "--fusion"),
        ("generate", checkpoint, "-p", "the cat", "--optimize"),
    )
    for command in commands:
        with monkeypatch.context() as patch:
            patch.setattr(optimize, "runnable_batch", lambda _: None)
            assert refused(*command) == (
                "no input was found that LlamaForCausalLM accepts: leave out --optimize or --fusion; in Python, "
                "optimize_for_inference takes a sample."
            )
        with monkeypatch.context() as patch:
            patch.setattr(optimize, "MOST_CHANGE", -1.0)
            assert refused(*command).startswith("fusing would change the outputs of LlamaFor")
        with monkeypatch.context() as patch:
            patch.setattr(optimize, "_linears", lambda _: ({}, []))
            assert refused(*command).endswith("to optimize: leave out --optimize or --fusion.")
