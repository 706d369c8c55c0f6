"""The command line with encoders, vision models and unsupported models, with short texts and full disks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers

from smoothquant_kernels import SmoothQuantConfig, load_quantized, smooth_and_quantize
from smoothquant_kernels.cli import quantize
from smoothquant_kernels.evaluation.models import load_model
from smoothquant_kernels.streaming import stream as stream_module
from tests.support.command_line import QUANTIZE, TEXT, VOCABULARY, Result, refused, word_tokenizer

SIZES = {
    "vocab_size": len(VOCABULARY),
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 40,
}


def saved(model: Any, folder: Path, **tokenizer: bool) -> Path:
    model.save_pretrained(folder)
    word_tokenizer(**tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = transformers.BertConfig(**SIZES)
    return saved(
        transformers.BertModel(config), tmp_path_factory.mktemp("bert") / "bert", encoder=True
    )


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES, bos_token_id=1, eos_token_id=2)
    return saved(transformers.LlamaForCausalLM(config), tmp_path_factory.mktemp("llama") / "llama")


# --- encoders ---------------------------------------------------------------------------------------------------------


def test_an_encoder_is_quantized_as_by_the_api(bert: Path, text: Path, tmp_path: Path) -> None:
    output = tmp_path / "q"
    done = Result("quantize", bert, "-o", output, "--calibration", text, *QUANTIZE, "--json").json
    assert done["quantized"] == 13 and done["smoothing"]["none"] < 13
    assert done["calibration"] == {
        "source": str(text), "tokens": 200, "asked": 200, "images": 0,
    }  # fmt: skip
    assert Result("inspect", output, "--verify", "--json").json["files_verified"]
    ids = torch.tensor([[1, 5, 6, 7, 8, 2]])
    again: Any = load_quantized(output)
    assert type(again).__name__ == "BertModel"

    # The same by the API: whole windows, each between <s> and </s>, and the last one is cut.
    tokens = word_tokenizer()(TEXT, add_special_tokens=False)["input_ids"]
    windows = [torch.tensor([[1, *tokens[i : i + 37], 2]]) for i in range(0, 6 * 37, 37)]
    config = SmoothQuantConfig(calibration_tokens=200)
    model = smooth_and_quantize(load_model(bert), windows, config, progress=False)
    with torch.no_grad():
        same = model(input_ids=ids).last_hidden_state
        assert torch.equal(again(input_ids=ids).last_hidden_state, same)


def test_report_on_an_encoder(bert: Path, text: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    command = ("report", bert, "-o", tmp_path / "r", "--calibration", text, *QUANTIZE)
    assert "measures perplexity" in refused(*command, "--text", text)
    done = Result(*command, "--tokens", "64", "--json").json
    assert done["summary"]["quantized"] == 13 and done["evaluation"] is None
    assert (tmp_path / "r" / "report.html").is_file()


@pytest.mark.parametrize("command", [("evaluate",), ("generate", "-p", "the cat")])
def test_evaluate_and_generate_need_a_causal_model(
    bert: Path, text: Path, tmp_path: Path, command: tuple[str, ...], monkeypatch: Any
) -> None:
    output = tmp_path / "q"
    Result("quantize", bert, "-o", output, "--calibration", text, *QUANTIZE, "--no-smooth")
    monkeypatch.setattr(
        "smoothquant_kernels.evaluation.models.load_model", lambda *_: pytest.fail("loaded")
    )
    monkeypatch.setattr("smoothquant_kernels.cli.loading.load_quantized", lambda *_: pytest.fail())
    for source in (bert, output):
        said = refused(*command[:1], source, *command[1:])
        assert said.startswith(
            f"{command[0]} needs a causal language model, and {source} is a Bert"
        )


ENCODERS = {
    "BertForMaskedLM": transformers.BertConfig,
    "RobertaModel": transformers.RobertaConfig,
    "DistilBertForMaskedLM": transformers.DistilBertConfig,
    "LlamaModel": transformers.LlamaConfig,
    "BertForSequenceClassification": transformers.BertConfig,
}


@pytest.mark.parametrize("name", ENCODERS)
def test_other_text_models_are_quantized(name: str, text: Path, tmp_path: Path) -> None:
    config = ENCODERS[name](**SIZES, pad_token_id=0)
    source = saved(getattr(transformers, name)(config), tmp_path / "float", encoder=True)
    output = tmp_path / "q"
    done = Result(
        "quantize", source, "-o", output, "--calibration", text, "--json",
        "--calibration-tokens", "64", "--device", "cpu",
    ).json  # fmt: skip
    assert done["quantized"] >= 12
    assert type(load_quantized(output)).__name__ == name


def test_a_vision_model_is_calibrated_on_images(text: Path, tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    config = transformers.ViTConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        image_size=16, patch_size=4,
    )  # fmt: skip
    source = tmp_path / "vit"
    transformers.ViTForImageClassification(config).save_pretrained(source)
    processor = {"image_processor_type": "ViTImageProcessor", "size": {"height": 16, "width": 16}}
    (source / "preprocessor_config.json").write_text(json.dumps(processor))
    command = ("quantize", source, "-o", tmp_path / "q", "--device", "cpu")
    assert "give --calibration a folder with some (.png" in refused(*command)
    photos = tmp_path / "photos" / "more"
    photos.mkdir(parents=True)
    for i in range(3):
        pixels = torch.randint(0, 256, (20 * 30 * 3,), generator=torch.Generator().manual_seed(i))
        image.frombytes("RGB", (20, 30), bytes(pixels.tolist())).save(photos / f"{i}.png")
    (photos / "note.txt").write_text("no image")
    done = Result(*command, "--calibration", photos.parent, "--json").json
    assert done["calibration"]["images"] == 3 and done["quantized"] == 13
    assert (tmp_path / "q" / "preprocessor_config.json").is_file()
    assert type(load_quantized(tmp_path / "q")).__name__ == "ViTForImageClassification"
    (photos / "3.png").write_bytes(b"no image")
    said = refused("quantize", source, "-o", tmp_path / "r", "--calibration", photos.parent)
    assert "3.png could not be read as an image" in said


def test_unsupported_models_are_refused(text: Path, tmp_path: Path) -> None:
    """Each is refused in one sentence before the weights are read. The sentence names the way in Python."""
    t5 = transformers.T5Config(vocab_size=30, d_model=32, d_ff=64, num_layers=1, num_heads=4)
    cases = [
        (t5, "T5ForConditionalGeneration", "is an encoder-decoder"),
        (transformers.WhisperConfig(), "WhisperForConditionalGeneration", "input_features with"),
        (transformers.CLIPConfig(), "CLIPModel", "reads input_ids and more"),
        (transformers.Wav2Vec2Config(), "Wav2Vec2ForCTC", "reads input_values"),
    ]
    for config, name, words in cases:
        folder = tmp_path / name
        folder.mkdir()
        config.architectures = [name]
        config.save_pretrained(folder)
        (folder / "model.safetensors").write_bytes(b"not read")
        for more in ((), ("--stream",), ("--no-smooth",)):
            said = refused("quantize", folder, "-o", tmp_path / "q", "--calibration", text, *more)
            assert words in said and "in Python, pass such batches" in said, said
    said = refused("evaluate", tmp_path / "CLIPModel", "--text", text)
    assert "causal language model" in said and "no command takes it: in Python, " in said


# --- data, disk, damage -----------------------------------------------------------------------------------------------


def test_the_announced_tokens_are_used(llama: Path, text: Path, tmp_path: Path) -> None:
    """200 is a multiple neither of the model's 40 positions nor of the windows, which overlap in one token."""
    result = Result("quantize", llama, "-o", tmp_path / "q", "--calibration", text, *QUANTIZE)
    assert f"calibrating on 200 tokens of {text}\n" in result.err and "fewer" not in result.err
    assert f"calibrated on  200 tokens of {text}" in result.out
    assert Result("inspect", tmp_path / "q", "--json").json["calibration_tokens"] == 200


def test_a_short_text_is_reported(llama: Path, tmp_path: Path) -> None:
    few = tmp_path / "few.txt"
    few.write_text("the cat sat on a mat")
    command = ("quantize", llama, "-o", tmp_path / "q", "--calibration", few, "--device", "cpu")
    result = Result(*command, "--calibration-tokens", "64", "--json")
    assert f"{few} has 6 tokens, fewer than the 64 asked for\n" in result.err
    assert (result.json["calibration"]["tokens"], result.json["calibration"]["asked"]) == (6, 64)


@pytest.mark.parametrize("stream", [(), ("--stream",)])
def test_a_full_disk_is_refused_before_any_work(
    llama: Path, text: Path, tmp_path: Path, stream: tuple[str, ...], monkeypatch: Any
) -> None:
    command = ("quantize", llama, "-o", tmp_path / "q", "--calibration", text, *QUANTIZE, *stream)
    with monkeypatch.context() as patch:
        for module, name in ((quantize, "calibrate_model"), (stream_module, "smooth_into")):
            patch.setattr(module, name, lambda *_, **__: pytest.fail("worked"))
        patch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1_000_000))
        said = refused(*command)
    assert said.startswith(f"{tmp_path / 'q'} will take about ") and "has 0.001 GB free" in said
    assert list(tmp_path.iterdir()) == []
    size = Result(*command, "--json").json["bytes"]["weight_files"]
    # The weights and 1 MiB for all other files. Streaming joins its files and so needs room for one more.
    enough = (size + (1 << 20)) * (2 if stream else 1) + 50_000
    for free, code in ((size, 2), (enough, 0)):
        with monkeypatch.context() as patch:
            patch.setattr(shutil, "disk_usage", lambda _, free=free: SimpleNamespace(free=free))
            assert Result(*command, "--force").code == code


def test_a_truncated_file_is_named(llama: Path, text: Path, tmp_path: Path) -> None:
    cut = shutil.copytree(llama, tmp_path / "cut") / "model.safetensors"
    cut.write_bytes(cut.read_bytes()[:-100])
    for stream in ((), ("--stream",)):
        said = refused("quantize", cut.parent, "-o", tmp_path / "q", "--calibration", text, *stream)
        assert said.startswith(f"{cut} cannot be read (it has "), said
        assert said.endswith(": copy or download it again.")


def test_streaming_needs_a_folder(text: Path, tmp_path: Path) -> None:
    file = tmp_path / "x.gguf"
    file.write_bytes(b"GGUF")
    command = ("-o", tmp_path / "q", "--calibration", text, "--stream")
    said = refused("quantize", file, *command)
    assert said.startswith(f"{file} is a file: ") and said.endswith(
        "anything else, leave out --stream."
    )
    assert "org/model is not a local folder" in refused("quantize", "org/model", *command)


def test_force_is_suggested_only_where_it_helps(llama: Path, text: Path, tmp_path: Path) -> None:
    full, empty = tmp_path / "full", tmp_path / "empty"
    for folder in (full, empty):
        folder.mkdir()
    (full / "thesis.txt").write_text("years of work")
    command = ("quantize", llama, "--calibration", text, *QUANTIZE, "-o")
    for force in ((), ("--force",)):
        for stream in ((), ("--stream",)):
            said = refused(*command, full, *force, *stream)
            assert "is not a checkpoint" in said and "--force" not in said and "another" in said
    assert Result(*command, empty).code == 0  # save_quantized accepts an empty folder
    assert "or --force" in refused(*command, empty)


def test_inspect_verify(llama: Path, text: Path, tmp_path: Path) -> None:
    output = tmp_path / "q"
    Result("quantize", llama, "-o", output, "--calibration", text, *QUANTIZE, "--no-smooth")
    assert "every file is what was saved" in Result("inspect", output, "--verify").out
    assert "every file" not in Result("inspect", output).out
    weights = output / "smoothquant.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    (output / "tokenizer.json").unlink()
    result = Result("inspect", output, "--verify", "--json")
    assert (result.code, result.out) == (1, "")
    assert f"{weights} is not what was saved" in result.err
    assert f"{output / 'tokenizer.json'} is missing" in result.err
    manifest = output / "smoothquant.json"
    manifest.write_text(manifest.read_text().replace("per_token", "static"))
    result = Result("inspect", output, "--verify")
    assert result.code == 1 and f"{manifest} is damaged" in result.err
    assert "is not a checkpoint" in refused("inspect", llama, "--verify")


def test_smooth_rounding_to_powers_of_two(llama: Path, text: Path, tmp_path: Path) -> None:
    command = ("quantize", llama, "-o", tmp_path / "q", "--calibration", text, *QUANTIZE)
    done = Result(*command, "--smooth-rounding", "power_of_two", "--json").json
    assert done["config"]["smooth_rounding"] == "power_of_two"
    assert done["verification"]["relative_change"] == 0.0


def test_messages_name_options_instead_of_arguments(
    llama: Path, text: Path, tmp_path: Path
) -> None:
    partial = tmp_path / ".q.partial"
    partial.mkdir()
    (partial / "call.json").write_text('{"config": "another"}')
    command = ("quantize", llama, "-o", tmp_path / "q", "--calibration", text, *QUANTIZE)
    said = refused(*command, "--stream")
    assert "add --restart to drop it" in said and "resume" not in said
    assert Result(*command, "--stream", "--restart").code == 0


def test_a_checkpoint_of_another_tool_is_refused(llama: Path, text: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(llama, tmp_path / "gptq")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes(b"not read")
    for stream in ((), ("--stream",)):
        said = refused("quantize", folder, "-o", tmp_path / "q", "--calibration", text, *stream)
        assert said == f"{folder} is quantized already by GPTQ: give the original float model."
    assert "by GPTQ" in refused("evaluate", folder, "--text", text)


def test_folders_without_a_manifest_are_told_apart(
    checkpoint: Path, text: Path, tmp_path: Path
) -> None:
    """A broken folder of save_quantized, and one of save_pretrained, which no command loads."""
    folder = shutil.copytree(checkpoint, tmp_path / "q")
    (folder / "smoothquant.json").unlink()
    commands = (
        ("evaluate", folder, "--text", text),
        ("generate", folder, "--prompt", "a"),
        ("inspect", folder),
    )
    for command in commands:
        said = refused(*command)
        assert said == f"{folder} is incomplete, smoothquant.json is missing: copy it again."
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]["weights"]  # save_pretrained writes none
    (folder / "config.json").write_text(json.dumps(config))
    for command in commands:
        assert refused(*command) == (
            f"{folder} was written by save_pretrained: in Python, from_pretrained loads it after "
            "register_transformers()."
        )
    assert refused("quantize", folder, "-o", tmp_path / "again") == (
        f"{folder} is quantized already; give the original model."
    )
