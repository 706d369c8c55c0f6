// What the rows of the GEMM tables are called: as JSON, for doctor, tests and the tuner, and in the
// list of rows that are ruled out. Kernel ring: no torch, no GPU.
#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>
#include <vector>

#include "gemm/excluded.h"

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

// A row's name in one word: the blanks are hyphens.
std::string word(std::string_view name) {
  std::string text(name);
  std::replace(text.begin(), text.end(), ' ', '-');
  return text;
}

std::string id(const GemmTableView& table, int row) {
  return std::string(table.name) + "/" + word(table.tiles[row].name);
}

std::string tile_json(const GemmTableView& table, int row, bool excluded) {
  const GemmTile& tile = table.tiles[row];
  const std::string cluster =
      "[" + std::to_string(tile.cluster_m) + ", " + std::to_string(tile.cluster_n) + "]";
  return Object()
      .add("tile", int64_t{row})
      .add("id", id(table, row).c_str())
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
      .add("candidate", std::string(row >= table.shipped ? "true" : "false"))
      .add("excluded", std::string(excluded ? "true" : "false"))
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
  const Excluded* const excluded = excluded_tiles();
  for (int i = 0; i < kGemmTables; ++i) {
    const auto index = static_cast<GemmTable>(i);
    const GemmTableView& table = gemm_table(index);
    tables.add(
        table.name,
        Object()
            .add("machine", machine_json(table.machine))
            .add("tiles", list(table.tile_count,
                               [&](int row) {
                                 const bool out = excluded != nullptr && excluded->has(index, row);
                                 return tile_json(table, row, out);
                               }))
            .add("rules",
                 list(table.rule_count, [&](int row) { return rule_json(table.rules[row]); }))
            .end());
  }
  return tables.end();
}

// --- rows that are ruled out -----------------------------------------------------------------

// Every row that `entry` names: with its table, or in every table that has it.
bool add_rows(const std::string& entry, Excluded& to) {
  bool found = false;
  for (int i = 0; i < kGemmTables; ++i) {
    const GemmTableView& table = gemm_table(static_cast<GemmTable>(i));
    for (int row = 0; row < table.tile_count; ++row) {
      if (entry != id(table, row) && entry != word(table.tiles[row].name)) continue;
      to.rows[i] |= uint64_t{1} << row;
      found = true;
    }
  }
  return found;
}

// nullptr where the list is empty.
std::unique_ptr<const Excluded> parse(const char* list) {
  auto found = std::make_unique<Excluded>();
  bool any = false;
  constexpr std::string_view kBlanks = " \t\r\n";
  std::string_view rest = list == nullptr ? "" : list;
  while (!rest.empty()) {
    const size_t comma = std::min(rest.find(','), rest.size());
    std::string_view entry = rest.substr(0, comma);
    rest.remove_prefix(std::min(comma + 1, rest.size()));
    const size_t first = entry.find_first_not_of(kBlanks);
    if (first == std::string_view::npos) continue;
    entry = entry.substr(first, entry.find_last_not_of(kBlanks) + 1 - first);
    any = true;
    if (!add_rows(word(entry), *found) && found->unknown.empty()) found->unknown = entry;
  }
  if (!any) return nullptr;
  return found;
}

// Lists that were replaced stay: a plan on another thread may be reading one.
const Excluded* keep(std::unique_ptr<const Excluded> excluded) {
  static std::mutex mutex;
  static std::vector<std::unique_ptr<const Excluded>> all;
  const std::lock_guard<std::mutex> lock(mutex);
  all.push_back(std::move(excluded));
  return all.back().get();
}

std::atomic<const Excluded*>& current_excluded() {
  static std::atomic<const Excluded*> current{keep(parse(std::getenv(kExcludedVariable)))};
  return current;
}

}  // namespace

const Excluded* excluded_tiles() { return current_excluded().load(std::memory_order_acquire); }

}  // namespace sqk

extern "C" const char* sqk_gemm_tables() {
  thread_local std::string text;
  text = sqk::tables_json();
  return text.c_str();
}

extern "C" int32_t sqk_gemm_without_tiles(const char* list) {
  auto found = sqk::parse(list != nullptr ? list : std::getenv(sqk::kExcludedVariable));
  const bool unknown = found != nullptr && !found->unknown.empty();
  if (unknown && list != nullptr) return static_cast<int32_t>(sqk::Status::kUnknownTile);
  sqk::current_excluded().store(sqk::keep(std::move(found)), std::memory_order_release);
  return static_cast<int32_t>(unknown ? sqk::Status::kUnknownTile : sqk::Status::kSuccess);
}
