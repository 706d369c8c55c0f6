#!/usr/bin/env bash
# bitsandbytes' 8-bit layers in a SigLIP 2 vision model: every picture is taken for a black one.
#
# transformers 5.24.0, bitsandbytes 0.50.2, torch 2.13.0 (CPU).
#
# SigLIP 2 embeds patches with an nn.Linear and casts the pixels to that layer's `weight.dtype` first. With
# `BitsAndBytesConfig(load_in_8bit=True)` the layer is an 8-bit one whose weight says int8, so pixels between -1 and 1 are
# cut to whole numbers, nearly all of them to 0. As loaded, the layer then fails on its bias ("data set to a tensor that
# requires gradients must be floating point"), which names neither pixels nor quantization. With the parameters frozen,
# as one does for inference, nothing is said: the output is that of a black picture, bit for bit.
#
# Output seen:
#   patch_embedding: Linear8bitLt, weight torch.int8
#   as loaded: RuntimeError: data set to a tensor that requires gradients must be floating point or complex dtype
#   frozen: a picture gives what a black one gives: True; in float: False
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0
"$folder/venv/bin/pip" install -q transformers==5.24.0 bitsandbytes==0.50.2 accelerate==1.15.0
cd "$folder"
venv/bin/python -W ignore - 2>errors <<'PYTHON' || { cat errors >&2; exit 1; }
import torch
from transformers import BitsAndBytesConfig, Siglip2VisionConfig, Siglip2VisionModel

torch.manual_seed(0)
config = Siglip2VisionConfig(
    hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_patches=16, patch_size=4
)
model = Siglip2VisionModel(config).eval()
model.save_pretrained("model")
quantized = Siglip2VisionModel.from_pretrained(
    "model", quantization_config=BitsAndBytesConfig(load_in_8bit=True), dtype=torch.float32
).eval()
layer = quantized.get_submodule("embeddings.patch_embedding")
print(f"patch_embedding: {type(layer).__name__}, weight {layer.weight.dtype}")
assert layer.weight.dtype == torch.int8

picture = torch.rand(1, 16, 48) * 2 - 1
rest = {"pixel_attention_mask": torch.ones(1, 16, dtype=torch.long), "spatial_shapes": torch.tensor([[4, 4]])}


def output(model, pixels):
    with torch.no_grad():
        return model(pixel_values=pixels, **rest).last_hidden_state


try:
    output(quantized, picture)
except RuntimeError as error:
    print(f"as loaded: RuntimeError: {error}")
    assert "requires gradients" in str(error)
else:
    raise AssertionError("as loaded it runs")
quantized.requires_grad_(False)
black = torch.zeros_like(picture)
blind = torch.equal(output(quantized, picture), output(quantized, black))
float_blind = torch.equal(output(model, picture), output(model, black))
print(f"frozen: a picture gives what a black one gives: {blind}; in float: {float_blind}")
assert blind and not float_blind
PYTHON
