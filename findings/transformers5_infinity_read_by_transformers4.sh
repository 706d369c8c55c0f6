#!/usr/bin/env bash
# A config with an infinity that transformers 5 has saved is misread by transformers 4: the number becomes a dict.
#
# transformers 5.24.0 (writer), 4.57.6 (reader), torch 2.13.0 (CPU).
#
# JSON has no infinity. transformers 4 writes the bare word Infinity, as Python's json does; transformers 5 writes the
# object {"__float__": "Infinity"} and reads both. transformers 4 takes that object for a dict, and the config loads
# without a word. Mamba 2's default time_step_limit is (0.0, inf), so a Mamba 2 that is saved with 5 and loaded with 4
# fails in its first forward pass, far from the file that is the cause. Nothing in config.json says which of the two
# forms it has but the version, `transformers_version`.
#
# Output seen:
#   5.24.0 wrote time_step_limit [0.0, {'__float__': 'Infinity'}], and reads [0.0, inf]
#   4.57.6 reads [0.0, {'__float__': 'Infinity'}]
#   4.57.6 runs it: TypeError: clamp() received an invalid combination of arguments
#   4.57.6 wrote time_step_limit [0.0, inf], and reads [0.0, inf]
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
pip=("$folder/venv/bin/pip" install -q)
"${pip[@]}" torch==2.13.0
cd "$folder"

cat >write.py <<'PYTHON'
import json
import sys

import transformers
from transformers import Mamba2Config

sizes = {"num_heads": 4, "head_dim": 16, "hidden_size": 32, "expand": 2, "state_size": 8, "n_groups": 1}
Mamba2Config(num_hidden_layers=1, vocab_size=64, **sizes).save_pretrained(sys.argv[1])
with open(f"{sys.argv[1]}/config.json") as file:
    wrote = json.load(file)["time_step_limit"]
reads = list(Mamba2Config.from_pretrained(sys.argv[1]).time_step_limit)
print(f"{transformers.__version__} wrote time_step_limit {wrote}, and reads {reads}")
assert reads == [0.0, float("inf")], reads
assert (wrote == reads) == (transformers.__version__[0] == "4"), wrote
PYTHON

cat >read.py <<'PYTHON'
import sys

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

version = transformers.__version__
config = AutoConfig.from_pretrained(sys.argv[1])
print(f"{version} reads {config.time_step_limit}")
assert config.time_step_limit[1] == {"__float__": "Infinity"}
try:
    AutoModelForCausalLM.from_config(config)(torch.arange(5)[None])
except TypeError as error:
    print(f"{version} runs it: TypeError: {str(error).split(' - ')[0]}")
else:
    raise AssertionError(f"{version} runs it")
PYTHON

"${pip[@]}" transformers==5.24.0
venv/bin/python -W ignore write.py five
"${pip[@]}" transformers==4.57.6
venv/bin/python -W ignore read.py five
venv/bin/python -W ignore write.py four
