"""The expected time of a GEMM by the dispatch's own arithmetic (csrc/gemm/cost.cpp), and measured times beside it."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `shapes`, `gpu_state`
