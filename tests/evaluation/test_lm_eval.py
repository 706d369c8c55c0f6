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

from smoothquant_kernels import load_quantized, register_transformers, save_quantized
from smoothquant_kernels.evaluation import lm_eval as wrapper
from smoothquant_kernels.evaluation.text import topics
from tests.support.checkpoints import (
    IDS,
    quantized,
    refusal,
)
from tests.support.models import GQA

TASK = "python_docs"
CHOICES = 4


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

    register_transformers()
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
