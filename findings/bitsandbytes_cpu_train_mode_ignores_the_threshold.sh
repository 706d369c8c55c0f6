#!/usr/bin/env bash
# bitsandbytes' Linear8bitLt on a CPU: in train mode it is another layer, without int8 activations and outliers.
#
# bitsandbytes 0.50.2, torch 2.13.0 (CPU).
#
# In eval mode, LLM.int8() runs as documented: activations become int8, and columns in which a value reaches the threshold
# are multiplied in float. After `.train()`, the same layer with frozen int8 weights multiplies the float input by the
# dequantized weight, so the threshold has no effect and the output is another one. Nothing is said. By its source, this
# is so on a CPU and on Intel's XPU, not on a GPU. A loss that is watched in train mode is therefore not that of the
# model that is evaluated afterwards.
#
# Output seen:
#   eval: distance to the product with the dequantized weight 0.1249, outlier columns [7]
#   train: distance to the product with the dequantized weight 0.0000, threshold 1.0 and 6.0 agree: True
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0
"$folder/venv/bin/pip" install -q bitsandbytes==0.50.2
cd "$folder"
venv/bin/python -W ignore - 2>errors <<'PYTHON' || { cat errors >&2; exit 1; }
import torch
from bitsandbytes.nn import Int8Params, Linear8bitLt

torch.manual_seed(0)
x, w = torch.randn(5, 64), torch.randn(8, 64)
x[2, 7] = 60.0


def layer(threshold):
    made = Linear8bitLt(64, 8, bias=False, has_fp16_weights=False, threshold=threshold)
    made.weight = Int8Params(w.clone(), requires_grad=False, has_fp16_weights=False)
    return made.to("cpu").eval()


with torch.no_grad():
    first, other = layer(6.0), layer(1.0)
    y = first(x)
    weight = first.state.CB.float() * first.state.SCB[:, None] / 127
    product = x @ weight.T
    away = float((y - product).abs().max())
    print(f"eval: distance to the product with the dequantized weight {away:.4f}, ", end="")
    print(f"outlier columns {first.state.idx.tolist()}")
    assert away > 1e-3 and first.state.idx.tolist() == [7]
    other(x)  # makes its int8 weights
    trained = first.train()(x)
    away = float((trained - product).abs().max())
    same = torch.equal(trained, other.train()(x))
    print(f"train: distance to the product with the dequantized weight {away:.4f}, ", end="")
    print(f"threshold 1.0 and 6.0 agree: {same}")
    assert away < 1e-4 and same
PYTHON
