"""The Language Model Evaluation Harness on our checkpoints, and transformers' `from_pretrained`, which it calls."""

from __future__ import annotations

import functools
import json
import random
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers.quantizers.base import HfQuantizer

from smoothquant_kernels import load_quantized, save_quantized
from smoothquant_kernels.checkpoint import transformers_hook
from smoothquant_kernels.checkpoint.manifest import INDEX, MANIFEST
from smoothquant_kernels.checkpoint.transformers_hook import register_transformers
from smoothquant_kernels.evaluation import lm_eval as wrapper
from smoothquant_kernels.evaluation.text import topics
from smoothquant_kernels.storage.digests import digest
from tests.support.checkpoints import (
    IDS,
    assert_same_bits,
    assert_same_state,
    logits,
    quantized,
    refusal,
)
from tests.support.models import GQA

TASK = "python_docs"
CHOICES = 4


# --- from_pretrained --------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path) -> tuple[nn.Module, Path]:
    model = quantized()
    return model, save_quantized(model, tmp_path / "saved")


def register() -> None:
    if not hasattr(HfQuantizer, "update_attn_implementation"):
        pytest.skip(
            f"transformers {transformers.__version__} has no hook that runs before it looks for weights"
        )
    register_transformers()


def from_pretrained(folder: Path, **options: Any) -> Any:
    register()
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **options)


@pytest.mark.parametrize("scheme", ["per_token", "static"])
def test_from_pretrained_equals_load_quantized(scheme: str, tmp_path: Path) -> None:
    model = quantized(scheme=scheme)
    folder = save_quantized(model, tmp_path / "saved")
    loaded, info = from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())  # nothing missing, nothing left over, nothing of another shape
    assert_same_bits(logits(loaded), logits(model))
    assert_same_state(loaded, load_quantized(folder))
    assert loaded.smoothquant_info == model.smoothquant_info
    assert not loaded.training


def test_the_checkpoint_decides_the_dtype_and_attention(saved: tuple[nn.Module, Path]) -> None:
    model, folder = saved
    loaded = from_pretrained(folder, dtype=torch.float16, device_map="cpu")
    assert loaded.dtype == loaded.config.dtype == torch.float32
    assert_same_bits(logits(loaded), logits(model))
    assert (
        from_pretrained(folder, attn_implementation="eager").config._attn_implementation == "eager"
    )


def test_a_model_saved_with_eager_attention_loads_with_it(tmp_path: Path) -> None:
    def make() -> nn.Module:
        config = transformers.LlamaConfig(**GQA, attn_implementation="eager")
        return transformers.LlamaForCausalLM(config).eval()

    model: Any = quantized(make)
    loaded = from_pretrained(save_quantized(model, tmp_path / "saved"))
    assert loaded.config._attn_implementation == "eager"
    assert_same_bits(logits(loaded), logits(model))


def test_from_pretrained_reads_several_weight_files(
    saved: tuple[nn.Module, Path], tmp_path: Path
) -> None:
    model, _ = saved
    shards = save_quantized(model, tmp_path / "shards", max_shard_bytes=20_000)
    assert len(list(shards.glob("*.safetensors"))) > 3
    loaded = from_pretrained(shards)
    assert_same_state(loaded, load_quantized(shards))
    assert_same_bits(logits(loaded), logits(model))


def rewrite_without_index(folder: Path) -> None:
    """Writes the folder as a release without the index would have done."""
    manifest = folder / MANIFEST
    values = json.loads(manifest.read_text())
    (folder / INDEX).unlink()
    del values["files"][INDEX], values["digest"]
    manifest.write_text(json.dumps({**values, "digest": digest(values)}))


def test_refusals_of_from_pretrained(saved: tuple[nn.Module, Path], tmp_path: Path) -> None:
    model, folder = saved
    assert "spread the model" in refusal(lambda: from_pretrained(folder, device_map="auto"))
    shards = save_quantized(model, tmp_path / "shards", max_shard_bytes=20_000)
    rewrite_without_index(shards)
    assert "weight files" in refusal(lambda: from_pretrained(shards))
    with pytest.raises(ValueError, match="not serializable"):
        from_pretrained(folder).save_pretrained(tmp_path / "again")
    (folder / "smoothquant.json").unlink()
    assert "no smoothquant.json" in refusal(lambda: from_pretrained(folder))


def test_without_registration_nothing_is_loaded(
    saved: tuple[nn.Module, Path], monkeypatch: Any
) -> None:
    """transformers only warns of an unknown method. It must then fail to find weights, rather than make random ones."""
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

    register()
    monkeypatch.delitem(AUTO_QUANTIZATION_CONFIG_MAPPING, "smoothquant_kernels")
    with pytest.raises(OSError, match="no file named"):
        transformers.AutoModelForCausalLM.from_pretrained(saved[1])


def test_an_older_transformers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers_hook, "_done", False)
    monkeypatch.delattr(HfQuantizer, "update_attn_implementation", raising=False)
    assert "upgrade it, or use load_quantized" in refusal(register_transformers)


# --- lm_eval ----------------------------------------------------------------------------------------------------------


def questions(count: int = 20, seed: int = 0) -> list[dict[str, Any]]:
    """Which word comes next in a sentence of Python's documentation? The right word and three from other sentences."""
    text = " ".join(" ".join(topics("evaluation")[:40]).split())
    found = [s.split() for s in re.findall(r"[A-Z][A-Za-z ,]{60,120}\.", text)]
    chosen = [words[:12] for words in found if len(words) >= 12][:count]
    assert len(chosen) == count
    draw = random.Random(seed)
    rows = []
    for words in chosen:
        others = sorted({other[-1] for other in chosen} - {words[-1]})
        choices = [words[-1], *draw.sample(others, CHOICES - 1)]
        draw.shuffle(choices)
        row = {"text": " ".join(words[:-1]), "choices": choices, "label": choices.index(words[-1])}
        rows.append(row)
    return rows


class Setting:
    """A task, and a quantized model with its tokenizer, in memory and saved."""

    def __init__(self, folder: Path, word_tokenizer: Any) -> None:
        self.rows = questions()
        words = {w for row in self.rows for w in [*row["text"].split(), *row["choices"]]}
        self.tokenizer = word_tokenizer(["<unk>", "<eos>", *sorted(words)])
        self.tokenizer.eos_token = "<eos>"
        vocabulary = len(self.tokenizer)

        def make() -> nn.Module:
            config = {
                **GQA,
                "vocab_size": max(vocabulary, int(IDS.max()) + 1),
                "initializer_range": 0.2,
            }
            return transformers.LlamaForCausalLM(transformers.LlamaConfig(**config)).eval()

        self.model: Any = quantized(make, "per_token")
        self.saved = save_quantized(self.model, folder / "model", tokenizer=self.tokenizer)
        self.tasks = folder / "tasks"
        self.tasks.mkdir()
        data = self.tasks / "questions.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in self.rows))
        task = {
            "task": TASK,
            "dataset_path": "json",
            "dataset_kwargs": {
                "data_files": {"test": str(data)},
                "cache_dir": str(folder / "cache"),
            },
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": "text",
            "doc_to_choice": "choices",
            "doc_to_target": "label",
            "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        }
        (self.tasks / "task.yaml").write_text(json.dumps(task))  # JSON is YAML

    def log_likelihoods(self, model: nn.Module) -> list[list[float]]:
        """The log-likelihood of each choice of each question, computed without lm_eval."""
        table = []
        for row in self.rows:
            context = self.tokenizer(row["text"], add_special_tokens=False)["input_ids"]
            with torch.no_grad():
                last = model(input_ids=torch.tensor([context])).logits[0, -1]
            ids = [self.tokenizer(c, add_special_tokens=False)["input_ids"] for c in row["choices"]]
            assert all(len(i) == 1 for i in ids)
            table.append(last.log_softmax(-1)[[i[0] for i in ids]].tolist())
        return table

    def accuracy(self, table: list[list[float]]) -> float:
        hits = [
            max(range(CHOICES), key=v.__getitem__) == r["label"]
            for v, r in zip(table, self.rows, strict=True)
        ]
        return sum(hits) / len(hits)


@pytest.fixture(scope="module")
def harness() -> Any:
    return pytest.importorskip("lm_eval", reason="needs the extra eval: pip install lm-eval")


@pytest.fixture
def setting(harness: Any, tmp_path: Path, word_tokenizer: Any) -> Setting:
    return Setting(tmp_path, word_tokenizer)


def by_harness(setting: Setting, pretrained: Any) -> tuple[float, list[list[float]]]:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    model = HFLM(pretrained=pretrained, tokenizer=setting.tokenizer, batch_size=1, device="cpu")
    manager = TaskManager(include_path=str(setting.tasks), include_defaults=False)
    result = simple_evaluate(model, tasks=[TASK], task_manager=manager, bootstrap_iters=0)
    samples = sorted(result["samples"][TASK], key=lambda sample: sample["doc_id"])
    table = [[float(response[0]) for response in s["filtered_resps"]] for s in samples]
    return result["results"][TASK]["acc,none"], table


@pytest.mark.slow
def test_lm_eval_measures_what_the_checkpoint_computes(setting: Setting) -> None:
    accuracy, table = by_harness(setting, setting.model)
    own = setting.log_likelihoods(load_quantized(setting.saved))
    assert accuracy == setting.accuracy(own)
    # Both sides have the same float32 logits, but log_softmax may add in another order if the layout differs:
    # 200 float32 additions, each off by 2**-24 of a sum, in a result below 16.
    torch.testing.assert_close(
        torch.tensor(table), torch.tensor(own), rtol=0.0, atol=200 * 16 * 2.0**-24
    )
    assert by_harness(setting, load_quantized(setting.saved)) == (accuracy, table)
    # A task that every model answers in the same way would prove nothing.
    float_model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**{**GQA, "vocab_size": 300})
    )
    assert setting.log_likelihoods(float_model) != own


@pytest.mark.slow
def test_the_lm_eval_command_loads_a_folder(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import lm_eval.tasks

    register()
    out = tmp_path / "out"
    command = f"lm_eval run --model hf --model_args pretrained={setting.saved} --device cpu --batch_size 1"
    command += f" --tasks {TASK} --include_path {setting.tasks} --output_path {out}"
    monkeypatch.setattr(sys, "argv", command.split())
    # Reading the thousands of bundled tasks takes most of a minute, and the test uses none of them.
    manager = functools.partial(lm_eval.tasks.TaskManager, include_defaults=False)
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", manager)
    wrapper.main()
    (file,) = out.rglob("results_*.json")
    measured = json.loads(file.read_text())["results"][TASK]["acc,none"]
    assert measured == setting.accuracy(setting.log_likelihoods(setting.model))


def test_the_command_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wrapper, "find_spec", lambda name: None)
    assert "pip install 'smoothquant-kernels[eval]'" in refusal(wrapper.main)
