// The builder that the tables describe tiles with, as in `wgmma(128, 256,
// 128).cooperative().cluster(2, 1).stages(4)`, and the templates that make a table of such rows at
// compile time. Kernel ring: no torch.
#pragma once

#include <array>
#include <string_view>

#include "gemm/tiles/tile.h"

namespace sqk {

// Text made at compile time. A text that is too long does not compile.
class TileText {
 public:
  constexpr TileText& add(std::string_view words) {
    for (char character : words) text_[size_++] = character;
    return *this;
  }
  constexpr TileText& add(int64_t number) {
    if (number >= 10) add(number / 10);
    text_[size_++] = static_cast<char>('0' + number % 10);
    return *this;
  }
  constexpr const char* text() const { return text_; }

 private:
  char text_[40] = {};
  int size_ = 0;
};

// What a kernel is compiled for, packed into an integer: C++17 does not allow a struct as a
// template argument. It leaves out the rate, the splits, the name, the flags for gated GEMMs
// and 4 bits, and the warps of a streaming tile.
enum class TileKey : uint64_t {};

constexpr int kKeyParts = 11;
constexpr int kKeyBits[kKeyParts] = {2, 10, 10, 10, 4, 4, 5, 3, 1, 4, 4};

constexpr TileKey key_of(const GemmTile& t) {
  const bool stream = t.kernel == GemmKernel::kStream;
  const auto kernel = static_cast<int32_t>(t.kernel), schedule = static_cast<int32_t>(t.schedule);
  const int32_t warps_m = stream ? 0 : t.warps_m, warps_n = stream ? 0 : t.warps_n;
  const int32_t parts[kKeyParts] = {kernel,   t.m,      t.n,       t.k,         warps_m,    warps_n,
                                    t.stages, schedule, t.swap_ab, t.cluster_m, t.cluster_n};
  uint64_t key = 0;
  for (int i = 0; i < kKeyParts; ++i) {
    if (parts[i] >> kKeyBits[i] != 0) throw "a number of a tile has too many bits for kKeyBits";
    key = key << kKeyBits[i] | static_cast<uint64_t>(parts[i]);
  }
  return TileKey{key};
}

// The tile of a key. Fields that the key leaves out are zero.
constexpr GemmTile tile_of(TileKey tile_key) {
  auto key = static_cast<uint64_t>(tile_key);
  int32_t parts[kKeyParts] = {};
  for (int i = kKeyParts - 1; i >= 0; --i) {
    parts[i] = static_cast<int32_t>(key & ((uint64_t{1} << kKeyBits[i]) - 1));
    key >>= kKeyBits[i];
  }
  GemmTile tile = {};
  tile.kernel = static_cast<GemmKernel>(parts[0]);
  tile.m = parts[1], tile.n = parts[2], tile.k = parts[3];
  tile.warps_m = parts[4], tile.warps_n = parts[5];
  tile.stages = parts[6];
  tile.schedule = static_cast<Schedule>(parts[7]);
  tile.swap_ab = parts[8] != 0;
  tile.cluster_m = parts[9], tile.cluster_n = parts[10];
  return tile;
}

// A tile under construction: each call returns a changed copy.
class TileBuilder {
 public:
  constexpr TileBuilder(GemmKernel kernel, int m, int n, int k) {
    tile_.kernel = kernel;
    tile_.m = m;
    tile_.n = n;
    tile_.k = k;
    tile_.cluster_m = tile_.cluster_n = tile_.most_splits = 1;
  }

  // kMma: the warps of a block along m and n. kStream: the most warps of a block.
  constexpr TileBuilder warps(int m, int n) const {
    TileBuilder changed = *this;
    changed.tile_.warps_m = m;
    changed.tile_.warps_n = n;
    return changed;
  }
  constexpr TileBuilder warps(int most) const { return warps(1, most); }
  constexpr TileBuilder stages(int count) const {
    TileBuilder changed = *this;
    changed.tile_.stages = count;
    return changed;
  }
  constexpr TileBuilder splits(int most) const {
    TileBuilder changed = *this;
    changed.tile_.most_splits = most;
    return changed;
  }
  // Adds an instance for gated GEMMs.
  constexpr TileBuilder gated() const {
    TileBuilder changed = *this;
    changed.tile_.gated = true;
    return changed;
  }
  // Adds an instance for weights of 4 bits.
  constexpr TileBuilder w4() const {
    TileBuilder changed = *this;
    changed.tile_.w4 = true;
    return changed;
  }
  // Only an instance for weights of 4 bits: int8 weights do not take this tile.
  constexpr TileBuilder w4_only() const {
    TileBuilder changed = w4();
    changed.tile_.w4_only = true;
    return changed;
  }
  constexpr TileBuilder rate(int percent) const {
    TileBuilder changed = *this;
    changed.tile_.rate = percent;
    return changed;
  }

  // kWgmma: one of the three schedules.
  constexpr TileBuilder pingpong() const { return schedule(Schedule::kPingpong); }
  constexpr TileBuilder cooperative() const { return schedule(Schedule::kCooperative); }
  constexpr TileBuilder stream_k() const { return schedule(Schedule::kStreamK); }
  // kWgmma: tokens on the instruction's column side.
  constexpr TileBuilder swap_ab() const {
    TileBuilder changed = *this;
    changed.tile_.swap_ab = true;
    return changed;
  }
  // kWgmma: blocks along m and n that share their loads.
  constexpr TileBuilder cluster(int m, int n) const {
    TileBuilder changed = *this;
    changed.tile_.cluster_m = m;
    changed.tile_.cluster_n = n;
    return changed;
  }

  // For a tile that would otherwise have the name of another row of its table.
  constexpr TileBuilder cluster_in_name() const { return naming(kCluster); }
  constexpr TileBuilder stages_in_name() const { return naming(kStages); }
  constexpr TileBuilder warps_in_name() const { return naming(kWarps); }

  // Result files, SQK_WITHOUT_TILES and tune caches hold these names, so they must not change.
  constexpr TileText name() const {
    TileText name;
    const bool stream = tile_.kernel == GemmKernel::kStream;
    name.add(tile_.w4_only ? "w4 " : "")
        .add(stream ? "stream " : "")
        .add(tile_.m)
        .add("x")
        .add(tile_.n);
    if (!stream) name.add("x").add(tile_.k);
    if (tile_.swap_ab) name.add(" swap");
    if (tile_.schedule == Schedule::kStreamK) name.add(" stream-K");
    if (in_name_ == kCluster) name.add(" ").add(tile_.cluster_m).add("x").add(tile_.cluster_n);
    if (in_name_ == kStages) name.add(" ").add(tile_.stages).add(" stages");
    if (in_name_ == kWarps) name.add(" ").add(tile_.warps_n).add(" warps");
    return name;
  }

  constexpr GemmTile named(const char* name) const {
    GemmTile tile = tile_;
    tile.name = name;
    return tile;
  }

  // Lets an instance write a tile as the argument of a template.
  constexpr operator TileKey() const { return key_of(tile_); }

 private:
  enum InName { kNothing, kCluster, kStages, kWarps };

  constexpr TileBuilder schedule(Schedule schedule) const {
    TileBuilder changed = *this;
    changed.tile_.schedule = schedule;
    return changed;
  }
  constexpr TileBuilder naming(InName what) const {
    TileBuilder changed = *this;
    changed.in_name_ = what;
    return changed;
  }

  GemmTile tile_ = {};
  InName in_name_ = kNothing;
};

constexpr TileBuilder stream(int m, int n) { return {GemmKernel::kStream, m, n, 128}; }
constexpr TileBuilder mma(int m, int n, int k) { return {GemmKernel::kMma, m, n, k}; }
constexpr TileBuilder wgmma(int m, int n, int k) { return {GemmKernel::kWgmma, m, n, k}; }

// A rule as the tables write it: up to most_m tokens take one of these tiles. The likeliest comes
// first.
struct RuleRow {
  int64_t most_m;
  const char* tiles[kMostCandidates];
  const char* why;
};

// --- rows to a table -------------------------------------------------------------------------

template <size_t kShipped, size_t kCandidates>
constexpr auto all_rows(const TileBuilder (&shipped)[kShipped],
                        const TileBuilder (&candidates)[kCandidates]) {
  constexpr size_t kRows = kShipped + (SQK_TUNING ? kCandidates : 0);
  std::array<const TileBuilder*, kRows> rows{};
  for (size_t i = 0; i < kRows; ++i) {
    rows[i] = i < kShipped ? &shipped[i] : &candidates[i - kShipped];
  }
  return rows;
}

template <size_t kRows>
constexpr auto names_of(const std::array<const TileBuilder*, kRows>& rows) {
  std::array<TileText, kRows> names{};
  for (size_t i = 0; i < kRows; ++i) names[i] = rows[i]->name();
  return names;
}

template <size_t kRows>
constexpr auto tiles_of(const std::array<const TileBuilder*, kRows>& rows,
                        const std::array<TileText, kRows>& names) {
  std::array<GemmTile, kRows> tiles{};
  for (size_t i = 0; i < kRows; ++i) tiles[i] = rows[i]->named(names[i].text());
  return tiles;
}

// "M <= 8", or "M > 512" of the last rule.
template <size_t kRules>
constexpr auto whens_of(const RuleRow (&rows)[kRules]) {
  std::array<TileText, kRules> whens{};
  for (size_t i = 0; i < kRules; ++i) {
    const bool last = rows[i].most_m == kAnyM;
    if (last && i == 0) {
      whens[i].add("any M");
    } else {
      whens[i].add(last ? "M > " : "M <= ").add(rows[last ? i - 1 : i].most_m);
    }
  }
  return whens;
}

template <size_t kRows>
constexpr int32_t row_of(const char* name, const std::array<TileText, kRows>& names,
                         size_t shipped) {
  for (size_t i = 0; i < shipped; ++i) {
    if (same_text(name, names[i].text())) return static_cast<int32_t>(i);
  }
  throw "a rule names a tile that its table does not ship";
}

template <size_t kRules, size_t kRows>
constexpr auto rules_of(const RuleRow (&rows)[kRules], const std::array<TileText, kRules>& whens,
                        const std::array<TileText, kRows>& names, size_t shipped) {
  std::array<GemmRule, kRules> rules{};
  for (size_t i = 0; i < kRules; ++i) {
    rules[i] = {rows[i].most_m, {}, whens[i].text(), rows[i].why};
    for (int j = 0; j < kMostCandidates; ++j) {
      const char* const name = rows[i].tiles[j];
      rules[i].candidates[j] = name == nullptr ? -1 : row_of(name, names, shipped);
    }
  }
  return rules;
}

// The table that the rows make. Tiles are found by name: the order of the rows has no meaning, and
// a row's number is valid only within one build.
template <const auto& kShipped, const auto& kCandidates, const auto& kWritten>
struct TileTable {
  static constexpr auto kRows = all_rows(kShipped, kCandidates);
  static constexpr auto kNames = names_of(kRows);
  static constexpr auto kTiles = tiles_of(kRows, kNames);
  static constexpr auto kWhens = whens_of(kWritten);
  static constexpr auto kRules = rules_of(kWritten, kWhens, kNames, std::size(kShipped));

  static constexpr GemmTableView view(GemmTable table, const GemmMachine& machine) {
    return {name(table),
            machine,
            kTiles.data(),
            static_cast<int32_t>(kTiles.size()),
            static_cast<int32_t>(std::size(kShipped)),
            kRules.data(),
            static_cast<int32_t>(kRules.size())};
  }
  static constexpr bool has(TileKey key) {
    for (const GemmTile& tile : kTiles) {
      if (key_of(tile) == key) return true;
    }
    return false;
  }
};

}  // namespace sqk
