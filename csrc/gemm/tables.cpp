// The GEMM tables as JSON, for doctor, tests and the tuner. Kernel ring: no torch, no GPU.
#include <string>

#include "gemm/tile.h"

namespace sqk {
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

// One JSON object, member by member.
class Object {
 public:
  Object& add(const char* key, const std::string& json) {
    text_ += std::string(text_.size() > 1 ? ", " : "") + "\"" + key + "\": " + json;
    return *this;
  }
  Object& add(const char* key, int64_t number) { return add(key, std::to_string(number)); }
  Object& add(const char* key, const char* word) {
    return add(key, std::string("\"") + word + "\"");
  }
  std::string end() const { return text_ + "}"; }

 private:
  std::string text_ = "{";
};

template <typename Item>
std::string list(int count, const Item& item) {
  std::string text = "[";
  for (int i = 0; i < count; ++i) text += (i ? ", " : "") + item(i);
  return text + "]";
}

std::string tile_json(const GemmTile& tile, int row, bool candidate) {
  const std::string cluster =
      "[" + std::to_string(tile.cluster_m) + ", " + std::to_string(tile.cluster_n) + "]";
  return Object()
      .add("tile", int64_t{row})
      .add("name", tile.name)
      .add("kernel", name(tile.kernel))
      .add("m", int64_t{tile.m})
      .add("n", int64_t{tile.n})
      .add("k", int64_t{tile.k})
      .add("warps_m", int64_t{tile.warps_m})
      .add("warps_n", int64_t{tile.warps_n})
      .add("stages", int64_t{tile.stages})
      .add("schedule", name(tile.schedule))
      .add("swap_ab", std::string(tile.swap_ab ? "true" : "false"))
      .add("cluster", cluster)
      .add("most_splits", int64_t{tile.most_splits})
      .add("rate", int64_t{tile.rate})
      .add("shared_bytes", shared_bytes(tile))
      .add("why", tile.why)
      .add("candidate", std::string(candidate ? "true" : "false"))
      .end();
}

std::string rule_json(const GemmRule& rule) {
  int candidates = 0;
  while (candidates < kMostCandidates && rule.candidates[candidates] >= 0) ++candidates;
  return Object()
      .add("most_m", rule.most_m)
      .add("tiles", list(candidates, [&](int i) { return std::to_string(rule.candidates[i]); }))
      .add("when", rule.when)
      .add("why", rule.why)
      .end();
}

std::string machine_json(const GemmMachine& machine) {
  return Object()
      .add("macs", int64_t{machine.macs})
      .add("l2_bytes", int64_t{machine.l2_bytes})
      .add("sm_bytes", int64_t{machine.sm_bytes})
      .add("memory_bytes", int64_t{machine.memory_bytes})
      .add("overhead", int64_t{machine.overhead})
      .add("launch", int64_t{machine.launch})
      .end();
}

std::string tables_json() {
  Object tables;
  for (int i = 0; i < kGemmTables; ++i) {
    const GemmTableView& table = gemm_table(static_cast<GemmTable>(i));
    tables.add(
        table.name,
        Object()
            .add("machine", machine_json(table.machine))
            .add("tiles", list(table.tile_count,
                               [&](int row) {
                                 return tile_json(table.tiles[row], row, row >= table.shipped);
                               }))
            .add("rules",
                 list(table.rule_count, [&](int row) { return rule_json(table.rules[row]); }))
            .end());
  }
  return tables.end();
}

}  // namespace
}  // namespace sqk

extern "C" const char* sqk_gemm_tables() {
  static const std::string text = sqk::tables_json();
  return text.c_str();
}
