// The library's tables as Python dicts and lists. Python ring: no torch, no CUDA.
#pragma once

#include <pybind11/pybind11.h>

#include "python/entries.h"

namespace sqk::python {

// {"sm80": {"machine": {...}, "tiles": [...], "rules": [...]}, ...}
pybind11::dict gemm_tables(const Entries& entries);

// [{"path": "warp", "when": ..., "why": ...}, ...]
pybind11::list quantize_paths(const Entries& entries);

}  // namespace sqk::python
