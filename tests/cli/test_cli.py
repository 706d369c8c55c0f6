"""The command line: its output, its files and its refusals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from smoothquant_kernels.backends import onednn
from smoothquant_kernels.cli import console, doctor
from smoothquant_kernels.cli.tables.layers import summarize_layers
from smoothquant_kernels.modeling.record import LayerRecord
from smoothquant_kernels.storage.document import json_text, readable_size
from tests.support.command_line import QUANTIZE, TEXT, Result, refused

# --- results --------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["per_token", "per_tensor", "static"])
@pytest.mark.parametrize("flags", [(), ("--no-smooth",)])
def test_quantize_and_inspect_report_the_same(
    tiny: Path, text: Path, tmp_path: Path, scheme: str, flags: tuple[str, ...]
) -> None:
    output = tmp_path / "new" / "q"
    done = Result(
        "quantize", tiny, "-o", output, "--scheme", scheme, "--alpha", "0.5",
        "--skip", "*.0.*.o_proj",
        "--calibration", text, *QUANTIZE, *flags, "--json",
    ).json  # fmt: skip
    assert done["config"]["activation_scheme"] == scheme and done["config"]["alpha"] == 0.5
    assert done["quantized"] == 13
    assert {s["layers"]: s["count"] for s in done["skipped"]} == {
        "lm_head": 1, "model.layers.*.self_attn.o_proj": 1,
    }  # fmt: skip
    smoothed = done["smoothing"]["folded"] + done["smoothing"]["runtime"]
    # Smoothing may not help a random layer, which then counts as "none".
    assert smoothed + done["smoothing"].get("none", 0) == 13 and (smoothed < 10) == bool(flags)
    assert flags or 0 <= done["verification"]["relative_change"] <= 1e-5
    assert done["bytes"]["linears_after"] < 0.4 * done["bytes"]["linears_before"]

    seen = Result("inspect", output, "--json").json
    for key in ("quantized", "smoothing", "groups", "skipped", "config", "verification"):
        assert seen[key] == done[key], key
    weights = sum(p.stat().st_size for p in output.glob("*.safetensors"))
    tensors = seen["bytes"]["quantized_layers"] + seen["bytes"]["float_tensors"]
    assert 0 < weights - tensors < 20_000  # the rest is headers
    layer = next(x for x in seen["layers"] if x["name"] == "model.layers.1.mlp.down_proj")
    assert (layer["out_features"], layer["in_features"]) == (32, 64)
    assert layer["activation_scheme"] == scheme
    runtime, static = layer["smoothing"] == "runtime", scheme == "static"
    assert layer["bytes"] == 32 * 64 + 4 * 32 + 4 * 64 * runtime + 4 * static


def test_inspect_reads_no_weights(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a weight was loaded")

    monkeypatch.setattr("smoothquant_kernels.checkpoint.load.load_quantized", forbidden)
    monkeypatch.setattr("safetensors.torch.load_file", forbidden)
    result = Result("inspect", checkpoint)
    assert "model.layers.*.mlp.down_proj" in result.out
    assert "output head: stays in float" in result.out
    assert "version 1" in result.out and "14 layers in int8" in result.out


def test_options_override_the_configuration_file(tiny: Path, text: Path, tmp_path: Path) -> None:
    settings = tmp_path / "c.json"
    settings.write_text('{"alpha": 0.3, "activation_scheme": "static", "calibration_tokens": 100}')
    document = Result(
        "quantize", tiny, "-o", tmp_path / "q", "--config", settings, "--alpha", "0.7",
        "--calibration", text, "--device", "cpu", "--json",
    ).json  # fmt: skip
    assert document["config"]["alpha"] == 0.7
    assert document["config"]["activation_scheme"] == "static"
    assert document["calibration"]["tokens"] == 100


def test_evaluate_float_and_quantized(tiny: Path, checkpoint: Path, text: Path) -> None:
    options = ("--text", text, "--window", "64", "--max-tokens", "300", "--json")
    plain = Result("evaluate", tiny, *options).json
    same = Result("evaluate", tiny, "--reference", tiny, *options).json
    int8 = Result("evaluate", checkpoint, "--reference", tiny, *options).json
    assert (plain["quantized"], int8["quantized"]) == (False, True)
    assert plain["result"]["mean_kl"] is None
    assert same["result"]["mean_kl"] == 0.0 and same["result"]["top1_agreement"] == 1.0
    assert same["result"]["perplexity"] == plain["result"]["perplexity"]
    assert 0 < int8["result"]["mean_kl"] < 0.01
    assert int8["result"]["perplexity"] == pytest.approx(plain["result"]["perplexity"], rel=0.05)
    table = Result("evaluate", checkpoint, "--reference", tiny, *options[:-1]).out
    for value in ("{perplexity:.4f}", "{mean_kl:.5f}", "{top1_agreement:.2%}"):
        assert value.format(**int8["result"]) in table


def test_generate_continues_greedily(tiny: Path, checkpoint: Path) -> None:
    from transformers import AutoModelForCausalLM

    from smoothquant_kernels.evaluation.models import load_tokenizer

    options = ("--prompt", "the cat sat", "--max-new-tokens", "7", "--json")
    first, second = (Result("generate", tiny, *options).json for _ in range(2))
    assert first["text"] == second["text"] and first["new_tokens"] <= 7
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny), load_tokenizer(tiny)
    ids = tokenizer("the cat sat", return_tensors="pt")["input_ids"]
    for _ in range(7):
        with torch.no_grad():
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
        if ids[0, -1] == tokenizer.eos_token_id:
            break
    whole = tokenizer.decode(ids[0], skip_special_tokens=True)
    assert first["text"].startswith(" ") and "the cat sat" + first["text"] == whole
    int8 = Result("generate", checkpoint, *options).json
    assert int8["quantized"] and int8["new_tokens"] >= 1
    assert Result("generate", checkpoint, *options[:-1]).out == f"the cat sat{int8['text']}\n"


def test_force_replaces_a_checkpoint_and_nothing_else(
    tiny: Path, text: Path, tmp_path: Path
) -> None:
    command = ("quantize", tiny, "--calibration", text, *QUANTIZE, "--json")
    output = tmp_path / "q"
    assert Result(*command, "-o", output, "--alpha", "0.4").json["config"]["alpha"] == 0.4
    before = (output / "smoothquant.json").read_bytes()
    assert "exists already" in refused(*command, "-o", output)
    assert (output / "smoothquant.json").read_bytes() == before
    assert (
        Result(*command, "-o", output, "--alpha", "0.9", "--force").json["config"]["alpha"] == 0.9
    )
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("years of work")
    assert "not a checkpoint" in refused(*command, "-o", precious, "--force")
    assert [p.name for p in precious.iterdir()] == ["thesis.txt"]


def test_doctor_reports_this_machine() -> None:
    document = Result("doctor", "--json").json
    assert document["torch"] == torch.__version__
    library = document["cpu"]["library"]
    assert library["available"] != bool(library["reason"])
    assert document["cpu"]["int8"] in (library["usable_levels"] or onednn.MODES)
    assert document["cpu"]["threads"] == torch.get_num_threads()
    if not document["extension"]["available"]:
        assert document["extension"]["reason"] and not document["extension"]["cuda_kernels"]
    text = Result("doctor").out
    assert torch.__version__ in text and document["cpu"]["int8"] in text
    by = "the compiled CPU kernels" if library["available"] else "oneDNN"
    assert f"on the CPU run on {by}" in " ".join(text.split())


def test_doctor_lists_all_ops() -> None:
    names = (n.split("::") for n in torch._C._dispatch_get_all_op_names())
    ours = {n for space, n in names if space == "smoothquant_kernels" and n[0] != "_"}
    assert ours == set(doctor.OPS)


def test_sizes_are_readable() -> None:
    sizes = (0, 2_345, 224_000_000, 13_500_000_000)
    expected = ["0.0 kB", "2.3 kB", "224.0 MB", "13.5 GB"]
    assert [readable_size(size) for size in sizes] == expected


def test_like_reasons_are_grouped_and_numbers_become_ranges() -> None:
    def layer(n: int, reason: str) -> LayerRecord:
        return LayerRecord(
            f"model.layers.{n}.fc", smoothing="none", reason=reason,
            activation_scheme="per_token", out_features=4, in_features=4,
        )  # fmt: skip

    said = "int8 error {}% on the sample, {}% if smoothed"
    layers = [
        layer(n, said.format(*p)) for n, p in enumerate([("0.52", "9.70"), ("0.50", "10.10")])
    ]
    layers.append(layer(2, "model.layers.2.norm is read by something else"))
    groups = [(g["count"], g["reason"]) for g in summarize_layers(layers, [])["groups"]]
    assert groups == [
        (2, said.format("0.50 to 0.52", "9.70 to 10.10")),
        (1, "model.layers.*.norm is read by something else"),
    ]
    assert console.general_name("blocks.0.1.fc and layers.31") == "blocks.*.*.fc and layers.*"


def test_json_has_no_nan() -> None:
    text = json_text({"a": float("nan"), "b": [float("inf"), 1.5], "c": Path("x")})
    assert json.loads(text) == {"a": None, "b": [None, 1.5], "c": "x"}


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--alpha", "1.5"), "--alpha must be a number in [0, 1]; got 1.5."),
        (("--alpha", "nan"), "--alpha must be a number in [0, 1]; got nan."),
        (("--scheme", "per_row"), "--scheme must be one of per_token, per_tensor, static"),
        (("--weight-granularity", "row"), "--weight-granularity must be one of channel, tensor"),
        (("--calibration-tokens", "0"), "--calibration-tokens must be a whole number >= 1"),
        (("--calibration", "EMPTY"), "There is no text in"),
        (("--calibration", "MISSING"), "There is no file or folder"),
        (("--config", "UNKNOWN_KEY"), "unknown setting aplha; known are"),
        (("--config", "MISSING"), "cannot be read: No such file or directory"),
        (("--dtype", "int8"), "--dtype must be one of float32, bfloat16, float16"),
        (("--device", "abacus"), "the device 'abacus' cannot be used here"),
        (("--device", "meta"), "(it computes nothing): give auto, cpu, or a GPU"),
        (("--skip", "*"), "no linear layer to quantize"),
        (("--smooth-rounding", "up"), "--smooth-rounding must be one of auto, power_of_two, none"),
    ],
)
def test_bad_options(
    tiny: Path, text: Path, tmp_path: Path, options: tuple[str, str], sentence: str
) -> None:
    places = {
        "EMPTY": (tmp_path / "empty.txt", "\n \n"),
        "UNKNOWN_KEY": (tmp_path / "c.json", '{"aplha": 0.5}'),
        "MISSING": (tmp_path / "no/such/file.txt", None),
    }
    flag, value = options
    if value in places:
        path, content = places[value]
        value = str(path)
        if content is not None:
            path.write_text(content)
    before = sorted(p.name for p in tmp_path.iterdir())
    calibration = () if flag == "--calibration" else ("--calibration", text)
    command = ("quantize", tiny, "-o", tmp_path / "q", *calibration, flag, value)
    assert sentence in refused(*command)
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_an_unknown_model_is_refused(tmp_path: Path, text: Path) -> None:
    output = tmp_path / "q"
    command = ("quantize", tmp_path / "nowhere", "-o", output, "--calibration", text)
    assert f"There is no file or folder {tmp_path}/nowhere" in refused(*command)
    command = ("quantize", "no-such-org/no-such-model", "-o", output, "--calibration", text)
    assert "no model of that name in the local cache" in refused(*command)
    assert not output.exists()


def test_the_error_for_nan_weights_names_the_layer(tiny: Path, text: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in tiny.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    weights = load_file(broken / "model.safetensors")
    weights["model.layers.1.self_attn.k_proj.weight"][3, 4] = float("nan")
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    command = ("quantize", broken, "-o", tmp_path / "q", "--calibration", text, *QUANTIZE)
    said = refused(*command)
    assert "weight of layer model.layers.1.self_attn.k_proj has NaN" in said
    assert refused(*command, "--no-smooth") == said
    assert not (tmp_path / "q").exists()


def test_an_unwritable_output_is_refused(tiny: Path, text: Path, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    command = ("quantize", tiny, "--calibration", text, "-o")
    assert "cannot be written: Not a directory" in refused(*command, file / "q")
    if Path("/proc/self").exists():  # nobody can write there, not even root
        assert "/proc/q cannot be written" in refused(*command, "/proc/q")


def test_inspect_needs_a_checkpoint(tiny: Path, tmp_path: Path) -> None:
    assert "is not a checkpoint of this package" in refused("inspect", tiny)
    assert "there is no folder" in refused("inspect", tmp_path / "nowhere")


def test_a_damaged_checkpoint_is_refused(checkpoint: Path, tmp_path: Path, text: Path) -> None:
    for name in ("cut", "altered"):
        (tmp_path / name).mkdir()
        for file in checkpoint.iterdir():
            (tmp_path / name / file.name).write_bytes(file.read_bytes())
    weights = next((tmp_path / "cut").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "copy it again" in refused("inspect", tmp_path / "cut")
    assert "copy it again" in refused("evaluate", tmp_path / "cut", "--text", text)
    manifest = tmp_path / "altered" / "smoothquant.json"
    manifest.write_text(manifest.read_text().replace('"folded"', '"runtime"'))
    assert "damaged or was altered" in refused("inspect", tmp_path / "altered")


def test_a_checkpoint_is_not_quantized_again(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    said = refused("quantize", checkpoint, "-o", tmp_path / "q", "--calibration", text)
    assert "is quantized already" in said


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--prompt", ""), "the prompt is empty"),
        (("--prompt", "the cat", "--chat"), "no chat template"),
        (("--prompt", "the cat", "--max-new-tokens", "600"), "exceed the 512 positions"),
    ],
)
def test_refusals_of_generate(tiny: Path, arguments: tuple[str, ...], sentence: str) -> None:
    assert sentence in refused("generate", tiny, *arguments)


def test_refusals_of_evaluate(tiny: Path, text: Path, tmp_path: Path) -> None:
    assert "There is no file or folder" in refused("evaluate", tiny, "--text", tmp_path / "no.txt")
    said = refused("evaluate", tiny, "--text", text, "--window", "4096", "--max-tokens", "0")
    assert "longer than the 512 positions" in said


@pytest.mark.parametrize(
    "arguments", [("quantize",), ("fly",), ("evaluate", "x", "--window", "one"), ("inspect",)]
)
def test_wrong_usage_exits_with_two(arguments: tuple[str, ...]) -> None:
    result = Result(*arguments)
    assert result.code == 2 and result.out == "" and "Usage: " in result.err


# --- the process ----------------------------------------------------------------------------------


def test_the_module_prints_its_version() -> None:
    command = [sys.executable, "-m", "smoothquant_kernels", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("smoothquant-kernels ")


def test_an_interrupt_leaves_no_files(tiny: Path, text: Path, tmp_path: Path) -> None:
    output = tmp_path / "out" / "q"
    # Enough text for seconds of work, so that the signal arrives during it.
    text.with_name("long.txt").write_text(f"{TEXT}\n" * 1200)
    process = subprocess.Popen(
        [
            sys.executable, "-m", "smoothquant_kernels", "quantize", str(tiny), "-o", str(output),
            "--calibration", str(text.with_name("long.txt")), "--calibration-tokens", "10000000",
            "--device", "cpu", "--json",
        ],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        # A shell makes its background jobs ignore the signal, and their children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    assert process.stderr is not None
    assert any(line.startswith("calibrating") for line in process.stderr)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert out == "" and "Traceback" not in err and err.splitlines()[-1] == "Interrupted."
    assert list(tmp_path.iterdir()) == []
