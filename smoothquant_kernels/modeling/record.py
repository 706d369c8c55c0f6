"""What was done to a model, as `model.smoothquant_info` has it."""

from __future__ import annotations

INFO = "smoothquant_info"
