// Finds the rows of the GEMM tables that a user has ruled out by name. Kernel ring: no torch, no
// GPU.
#include "gemm/excluded.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>
#include <vector>

namespace sqk {
namespace {

// The name as one word: blanks become hyphens.
std::string word(std::string_view name) {
  std::string text(name);
  std::replace(text.begin(), text.end(), ' ', '-');
  return text;
}

// Adds every row that `entry` names: in one table if it names the table, else in all tables.
bool add_rows(const std::string& entry, Excluded& to) {
  bool found = false;
  for (int i = 0; i < kGemmTables; ++i) {
    const GemmTableView& table = gemm_table(static_cast<GemmTable>(i));
    for (int row = 0; row < table.tile_count; ++row) {
      if (entry != tile_id(table, row) && entry != word(table.tiles[row].name)) continue;
      to.rows[i] |= uint64_t{1} << row;
      found = true;
    }
  }
  return found;
}

// Returns nullptr if the list is empty.
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

// Replaced lists are kept, because a plan on another thread may be reading one.
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

std::string tile_id(const GemmTableView& table, int32_t row) {
  return std::string(table.name) + "/" + word(table.tiles[row].name);
}

const Excluded* excluded_tiles() { return current_excluded().load(std::memory_order_acquire); }

const char* unknown_tile() {
  const Excluded* const excluded = excluded_tiles();
  return excluded == nullptr ? "" : excluded->unknown.c_str();
}

}  // namespace sqk

extern "C" int32_t sqk_gemm_without_tiles(const char* list) {
  auto found = sqk::parse(list != nullptr ? list : std::getenv(sqk::kExcludedVariable));
  const bool unknown = found != nullptr && !found->unknown.empty();
  if (unknown && list != nullptr) return static_cast<int32_t>(sqk::Status::kUnknownTile);
  sqk::current_excluded().store(sqk::keep(std::move(found)), std::memory_order_release);
  return static_cast<int32_t>(unknown ? sqk::Status::kUnknownTile : sqk::Status::kSuccess);
}
