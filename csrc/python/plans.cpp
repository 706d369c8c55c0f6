#include "python/plans.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <iterator>
#include <string_view>

#include "common/arithmetic.h"
#include "gemm/cost.h"
#include "quantize/table.h"

namespace py = pybind11;

namespace sqk::python {
namespace {

// Any address that is aligned to 16 bytes; plans never read from it.
constexpr uintptr_t kAligned = 4096;

template <typename T>
T* somewhere() {
  return reinterpret_cast<T*>(kAligned);
}

bool succeeded(int32_t status) { return status == static_cast<int32_t>(Status::kSuccess); }

template <size_t kCount>
int32_t position(const std::string& word, const char* const (&words)[kCount], const char* what) {
  const auto found = std::find(std::begin(words), std::end(words), std::string_view(word));
  if (found != std::end(words)) return static_cast<int32_t>(found - std::begin(words));
  throw py::value_error("'" + word + "' is no " + what);
}

// In the order of the enum of sqk/quantize.h.
constexpr const char* kSchemeNames[] = {"token", "tensor", "static"};

DType float_type(const std::string& word) {
  for (int32_t index = 0; index < kDTypes; ++index) {
    const auto type = static_cast<DType>(index);
    if (is_float(type) && word == name(type)) return type;
  }
  throw py::value_error("'" + word + "' is no float type");
}

int32_t table_number(const Entries& entries, const std::string& name) {
  std::string known;
  for (int32_t index = 0; const GemmTableView* table = entries.gemm_table(index); ++index) {
    if (name == table->name) return index;
    known += (known.empty() ? "" : ", ") + std::string(table->name);
  }
  throw py::value_error("there is no table '" + name + "', only " + known);
}

int32_t row_of(const GemmTableView& table, const std::string& name) {
  for (int32_t row = 0; row < table.tile_count; ++row) {
    if (name == table.tiles[row].name) return row;
  }
  throw py::value_error("the table " + std::string(table.name) + " has no tile '" + name + "'");
}

}  // namespace

py::object plan_gemm(const Entries& entries, int64_t m, int64_t n, int64_t k,
                     const std::optional<Device>& device) {
  GemmParams params = {};
  params.m = m;
  params.n = n;
  params.k = k;
  params.x_q_stride = params.w_q_stride = round_up(k, kGemmAlignment);
  params.y_stride = n;
  params.y_dtype = DType::kFloat16;
  params.tile = -1;
  GemmPlan plan;
  if (!succeeded(entries.gemm_plan(&params, device ? &*device : nullptr, &plan)) ||
      plan.launches == 0) {
    return py::none();
  }
  const GemmTableView& table = *entries.gemm_table(static_cast<int32_t>(plan.table));
  py::dict found;
  found["table"] = table.name;
  found["tile"] = plan.tile;
  found["name"] = table.tiles[plan.tile].name;
  found["splits"] = plan.splits;
  found["launches"] = plan.launches;
  found["tiles"] = plan.tiles;
  found["blocks"] = plan.blocks;
  found["shared_bytes"] = plan.shared_bytes;
  found["workspace_bytes"] = plan.workspace_bytes;
  found["expected_clocks"] = plan.expected_clocks;
  const Device here = device ? *device : current_device(entries).value_or(Device{});
  found["bound_by"] =
      expected_cost(table.tiles[plan.tile], table.machine, params, here, plan.splits).bound_by;
  return found;
}

py::object plan_quantize(const Entries& entries, int64_t m, int64_t k, const Device& device,
                         const std::string& producer, const std::string& scheme,
                         const std::string& dtype, int32_t rotation) {
  QuantizeParams params = {};
  params.producer = static_cast<Producer>(position(producer, kProducerNames, "producer"));
  params.scheme = static_cast<Scheme>(position(scheme, kSchemeNames, "scheme"));
  params.dtype = float_type(dtype);
  params.rotation = rotation;
  params.path = QuantizePath::kAuto;
  params.m = m;
  params.k = k;
  params.x = somewhere<float>();
  params.x_q = somewhere<int8_t>();
  params.x_scale = somewhere<float>();
  params.scale = params.scheme == Scheme::kStatic ? somewhere<float>() : nullptr;
  params.x_stride = k;
  params.x_q_stride = params.k_padded = round_up(k, kGemmAlignment);
  QuantizePlan plan;
  if (!succeeded(entries.quantize_plan(&params, &device, &plan)) || plan.launches == 0) {
    return py::none();
  }
  py::dict found;
  found["path"] = name(plan.path);
  found["threads"] = plan.threads;
  found["rows"] = plan.rows;
  found["cluster"] = plan.cluster;
  found["splits"] = plan.splits;
  found["slice"] = plan.slice;
  found["slots"] = plan.slots;
  found["launches"] = plan.launches;
  found["blocks"] = plan.blocks;
  found["shared_bytes"] = plan.shared_bytes;
  found["workspace_bytes"] = plan.workspace_bytes;
  return found;
}

std::optional<Device> current_device(const Entries& entries) {
  Device device = {};
  return succeeded(entries.device(&device)) ? std::optional(device) : std::nullopt;
}

void use_measured(const Entries& entries, const std::string& table, int32_t sms,
                  const std::vector<MeasuredRow>& rows) {
  const int32_t index = table_number(entries, table);
  std::vector<GemmMeasured> measured;
  for (const auto& [n, k, m, tile, splits] : rows) {
    measured.push_back({n, k, m, row_of(*entries.gemm_table(index), tile), splits});
  }
  const int32_t status = entries.gemm_use_measured(
      static_cast<GemmTable>(index), sms, measured.data(), static_cast<int64_t>(measured.size()));
  if (!succeeded(status)) {
    throw py::value_error(
        "splits or tokens that a tile does not take, or two choices for one problem");
  }
}

void without_tiles(const Entries& entries, const std::optional<std::string>& names) {
  if (!succeeded(entries.gemm_without_tiles(names ? names->c_str() : nullptr))) {
    throw py::value_error("no table has such a tile");
  }
}

}  // namespace sqk::python
