#!/usr/bin/env bash
# The same float32 weight gives other bits for one token when safetensors has loaded it: MKL looks at its address.
#
# torch 2.13.0 (CPU, MKL), safetensors 0.8.0; an AMD EPYC with AVX2, one thread.
#
# torch's own memory is aligned to 64 bytes. A tensor that safetensors maps from a file lies where the file has it: its
# header is filled up to a multiple of 8 bytes, no more. For one row of x, F.linear calls MKL's matrix-vector product,
# which adds in an order that depends on the weight's address modulo 16. So a model loaded from a file and a copy of it (`clone`,
# `deepcopy`, `state_dict` into a new model) differ in the last bits of a float32 decoding step, with equal weights and
# the same threads; from two rows on they are equal. A comparison of such outputs for equality passes or fails by the
# length of the names in the file.
#
# Output seen:
#   AVX2, MKL: True
#   names of 1 letter(s): address modulo 16 is 0; 1 row: 0 of 256 outputs differ; 2 rows: 0
#   names of 9 letter(s): address modulo 16 is 8; 1 row: 206 of 256 outputs differ; 2 rows: 0
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0
"$folder/venv/bin/pip" install -q numpy safetensors==0.8.0
cd "$folder"
OMP_NUM_THREADS=1 venv/bin/python -W ignore - <<'PYTHON'
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

torch.manual_seed(0)
weight, x = torch.randn(256, 384), torch.randn(2, 384)
print(f"{torch.backends.cpu.get_cpu_capability()}, MKL: {torch.backends.mkl.is_available()}")
found = {}
for letters in (1, 9):
    save_file({"w" * letters: weight}, "file")
    loaded = load_file("file")["w" * letters]
    assert torch.equal(loaded, weight)
    copy = loaded.clone()
    one, two = ((F.linear(x[:m], loaded) != F.linear(x[:m], copy)).sum().item() for m in (1, 2))
    place = loaded.data_ptr() % 16
    print(f"names of {letters} letter(s): address modulo 16 is {place}; 1 row: {one} of 256 outputs differ; 2 rows: {two}")
    found[place] = (one > 0, two > 0)
assert found == {8: (True, False), 0: (False, False)}, found
PYTHON
