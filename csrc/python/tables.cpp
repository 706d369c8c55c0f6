#include "python/tables.h"

#include "gemm/excluded.h"

namespace py = pybind11;

namespace sqk::python {
namespace {

const char* name(GemmKernel kernel) {
  switch (kernel) {
    case GemmKernel::kStream:
      return "stream";
    case GemmKernel::kMma:
      return "mma";
    case GemmKernel::kWgmma:
      return "wgmma";
  }
  return "unknown";
}

const char* name(Schedule schedule) {
  switch (schedule) {
    case Schedule::kNone:
      return "";
    case Schedule::kPingpong:
      return "pingpong";
    case Schedule::kCooperative:
      return "cooperative";
    case Schedule::kStreamK:
      return "stream-K";
  }
  return "unknown";
}

py::dict tile_dict(const GemmTableView& table, int32_t row, bool excluded) {
  const GemmTile& tile = table.tiles[row];
  py::dict found;
  found["tile"] = row;
  found["id"] = tile_id(table, row);
  found["name"] = tile.name;
  found["kernel"] = name(tile.kernel);
  found["m"] = tile.m;
  found["n"] = tile.n;
  found["k"] = tile.k;
  found["warps_m"] = tile.warps_m;
  found["warps_n"] = tile.warps_n;
  found["stages"] = tile.stages;
  found["schedule"] = name(tile.schedule);
  found["swap_ab"] = tile.swap_ab;
  py::list cluster;
  cluster.append(tile.cluster_m);
  cluster.append(tile.cluster_n);
  found["cluster"] = cluster;
  found["most_splits"] = tile.most_splits;
  found["gated"] = tile.gated;
  found["w4"] = tile.w4;
  found["w4_only"] = tile.w4_only;
  found["rate"] = tile.rate;
  found["shared_bytes"] = shared_bytes(tile);
  found["candidate"] = row >= table.shipped;
  found["excluded"] = excluded;
  return found;
}

py::dict rule_dict(const GemmRule& rule) {
  py::list tiles;
  for (int32_t candidate : rule.candidates) {
    if (candidate >= 0) tiles.append(candidate);
  }
  py::dict found;
  found["most_m"] = rule.most_m;
  found["tiles"] = tiles;
  found["when"] = rule.when;
  found["why"] = rule.why;
  return found;
}

py::dict machine_dict(const GemmMachine& machine) {
  py::dict found;
  found["macs"] = machine.macs;
  found["l2_bytes"] = machine.l2_bytes;
  found["sm_bytes"] = machine.sm_bytes;
  found["memory_bytes"] = machine.memory_bytes;
  found["overhead"] = machine.overhead;
  found["launch"] = machine.launch;
  return found;
}

}  // namespace

py::dict gemm_tables(const Entries& entries) {
  py::dict tables;
  for (int32_t index = 0; const GemmTableView* table = entries.gemm_table(index); ++index) {
    py::list tiles, rules;
    for (int32_t row = 0; row < table->tile_count; ++row) {
      tiles.append(tile_dict(*table, row, entries.gemm_is_excluded(index, row) != 0));
    }
    for (int32_t row = 0; row < table->rule_count; ++row) {
      rules.append(rule_dict(table->rules[row]));
    }
    py::dict found;
    found["machine"] = machine_dict(table->machine);
    found["tiles"] = tiles;
    found["rules"] = rules;
    tables[table->name] = found;
  }
  return tables;
}

py::list quantize_paths(const Entries& entries) {
  int32_t count = 0;
  const PathRule* const rules = entries.quantize_rules(&count);
  py::list paths;
  for (int32_t i = 0; i < count; ++i) {
    py::dict row;
    row["path"] = name(rules[i].path);
    row["when"] = rules[i].when;
    row["why"] = rules[i].why;
    paths.append(row);
  }
  return paths;
}

}  // namespace sqk::python
