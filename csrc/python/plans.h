// Plans and choices by the sizes of a problem. Python ring: no torch, no CUDA.
#pragma once

#include <pybind11/pybind11.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "python/entries.h"

namespace sqk::python {

// n, k, m, the tile's name and splits.
using MeasuredRow = std::tuple<int64_t, int64_t, int64_t, std::string, int32_t>;

// The plan of a GEMM with aligned operands and a 16-bit y, as a dict. None if the plan is refused
// or launches nothing. Without a device, plans for the current GPU.
pybind11::object plan_gemm(const Entries& entries, int64_t m, int64_t n, int64_t k,
                           const std::optional<Device>& device);

// The same for a quantizer of aligned rows.
pybind11::object plan_quantize(const Entries& entries, int64_t m, int64_t k, const Device& device,
                               const std::string& producer, const std::string& scheme,
                               const std::string& dtype, int32_t rotation);

// The current GPU, or None.
std::optional<Device> current_device(const Entries& entries);

// Throws pybind11::value_error if the table or tile does not exist, or if the library refuses a
// row.
void use_measured(const Entries& entries, const std::string& table, int32_t sms,
                  const std::vector<MeasuredRow>& rows);

// Without names, SQK_WITHOUT_TILES applies again. Throws pybind11::value_error if no table has such
// a tile.
void without_tiles(const Entries& entries, const std::optional<std::string>& names);

}  // namespace sqk::python
