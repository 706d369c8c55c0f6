// Chooses the tile of a GEMM, by the rules of the tables or by what was measured. Kernel ring: no
// torch; this file needs no CUDA compiler and no GPU.
#include <algorithm>
#include <atomic>
#include <memory>
#include <mutex>
#include <numeric>
#include <string_view>
#include <tuple>
#include <utility>
#include <vector>

#include "common/arithmetic.h"
#include "common/valid.h"
#include "gemm/cost.h"
#include "gemm/excluded.h"
#include "gemm/measured.h"
#include "gemm/splits.h"
#include "gemm/tiles/tables.h"

namespace sqk {
namespace {

constexpr int64_t kMaxBlocks = (int64_t{1} << 31) - 1;

// A part of a GPU does not run stream-K, whose blocks wait for each other's parts of a tile. A
// block waits only for blocks with lower numbers (tests/csrc/test_stream_k.py), so none waits
// forever if they start in that order. But they lose time if fewer of them run at once than the
// plan assumed.
bool serves(const GemmTile& tile, const GemmParams& p, const Device& device) {
  if (device.part && tile.schedule == Schedule::kStreamK) return false;
  if (is_w4(p) ? !tile.w4 : tile.w4_only) return false;
  // A shorter last block of gate would be in another thread than its block of up.
  if (is_gated(p) && (!serves_gated(tile) || p.n % (2 * kGateBlock) != 0)) return false;
  return shared_bytes(tile) <= device.shared_bytes &&
         (tile.kernel != GemmKernel::kStream || p.m <= tile.m);
}

// A later candidate must be 3 % cheaper: the estimate is no more precise than that, and the rules
// name the simpler kernel first.
constexpr double kClearlyLess = 0.97;

struct Choice {
  int32_t tile = -1;
  double clocks = 0;
};

// Takes a row into account, unless it cannot serve or is excluded.
void consider(GemmTable index, int32_t candidate, const GemmParams& p, const Device& device,
              const Excluded* excluded, Choice& best) {
  const GemmTableView& table = gemm_table(index);
  if (candidate < 0 || !serves(table.tiles[candidate], p, device)) return;
  if (excluded != nullptr && excluded->has(index, candidate)) return;
  const GemmTile& tile = table.tiles[candidate];
  const int64_t splits = best_splits(tile, table.machine, p, device);
  const double clocks = expected_cost(tile, table.machine, p, device, splits).clocks;
  if (best.tile < 0 || clocks < kClearlyLess * best.clocks) best = {candidate, clocks};
}

// The shipped rows from the simplest kernel and the smallest tile to the largest one: what no rule
// says for problems that few rows serve. The order of the rows has no meaning.
std::vector<int32_t> by_size(const GemmTableView& table) {
  std::vector<int32_t> rows(table.shipped);
  std::iota(rows.begin(), rows.end(), 0);
  const auto size = [&](int32_t row) {
    const GemmTile& tile = table.tiles[row];
    return std::make_tuple(tile.kernel, tile.m * tile.n, std::string_view(tile.name));
  };
  std::sort(rows.begin(), rows.end(), [&](int32_t a, int32_t b) { return size(a) < size(b); });
  return rows;
}

// `excluded` holds the rows that must not be taken, or is nullptr. If it rules out all candidates
// of the rule, those of every rule are considered.
Choice choose(GemmTable index, const GemmParams& p, const Device& device,
              const Excluded* excluded) {
  const GemmTableView& table = gemm_table(index);
  const GemmRule* rule = table.rules;
  while (p.m > rule->most_m) ++rule;
  Choice best;
  const auto try_row = [&](int32_t row) { consider(index, row, p, device, excluded, best); };
  if (is_gated(p) || is_w4(p)) {
    for (int32_t row : by_size(table)) try_row(row);
    return best;
  }
  for (int32_t candidate : rule->candidates) try_row(candidate);
  if (best.tile >= 0 || excluded == nullptr) return best;
  for (int i = 0; i < table.rule_count; ++i) {
    for (int32_t candidate : table.rules[i].candidates) try_row(candidate);
  }
  return best;
}

// Whether the best tile that can compute a gated GEMM takes longer than the best one of all and
// a launch that reads what it wrote.
bool is_slower_gated(GemmTable index, const GemmParams& p, const Device& device,
                     const Excluded* excluded, const Choice& gated) {
  GemmParams product = p;
  product.activation = Producer::kQuantize;
  const Choice apart = choose(index, product, device, excluded);
  const GemmMachine& machine = gemm_table(index).machine;
  const double activation =
      machine.launch + machine.overhead + 2.0 * p.m * p.n / machine.memory_bytes;
  return apart.tile >= 0 && gated.clocks > apart.clocks + activation;
}

// --- measured choices ------------------------------------------------------------------------

struct Choices {
  GemmTable table;
  int32_t sms;
  std::vector<GemmMeasured> rows;  // by n, k, m
};

// The list that plans read. It is complete before it is stored here, and never changed or freed
// afterwards.
std::atomic<const Choices*> current{nullptr};

bool before(const GemmMeasured& a, const GemmMeasured& b) {
  return std::tie(a.n, a.k, a.m) < std::tie(b.n, b.k, b.m);
}

bool sound(const GemmTableView& table, const GemmMeasured& row) {
  if (row.m < 1 || row.n < 1 || row.k < 1 || row.k > kMaxGemmK || row.tile < 0 ||
      row.tile >= table.tile_count) {
    return false;
  }
  const GemmTile& tile = table.tiles[row.tile];
  return !tile.w4_only && row.splits >= 1 && row.splits <= tile.most_splits &&
         (tile.kernel != GemmKernel::kStream || row.m <= tile.m);
}

// Beyond this M, more tokens only add waves of the same tile, so a measurement still applies.
constexpr int64_t kManyTokens = 1024;

// Whether the best tile for `measured` tokens is a good choice for `m`. A tile suits a range of
// tokens, and the rules know more about a problem than a measurement at four times its size.
bool is_near(int64_t measured, int64_t m) {
  return measured >= m ? measured < 2 * m : measured >= kManyTokens;
}

// --- plans -----------------------------------------------------------------------------------

// Plans with the measured row `found`, or by the rules if it is nullptr.
Status make_plan(const GemmParams& params, const Device& device, const GemmMeasured* found,
                 GemmPlan* plan) {
  *plan = {};
  const Status status = check(params, kGemmAlignment);
  if (status != Status::kSuccess) return status;
  plan->table = table_of(device);
  const GemmTableView& table = gemm_table(plan->table);
  if (params.tile >= table.tile_count) return Status::kInvalidArgument;
  const Excluded* const excluded = excluded_tiles();
  if (excluded != nullptr && !excluded->unknown.empty()) return Status::kUnknownTile;
  const auto is_excluded = [&](int32_t row) {
    return excluded != nullptr && excluded->has(plan->table, row);
  };
  if (params.m == 0) return Status::kSuccess;
  plan->tile = params.tile;
  int64_t asked = params.splits;
  if (found != nullptr && serves(table.tiles[found->tile], params, device) &&
      !is_excluded(found->tile)) {
    plan->tile = found->tile;
    asked = found->splits;
  }
  if (plan->tile >= 0 && is_excluded(plan->tile)) return Status::kExcludedTile;
  if (plan->tile < 0) {
    const Choice best = choose(plan->table, params, device, excluded);
    plan->tile = best.tile;
    if (is_gated(params) && is_slower_gated(plan->table, params, device, excluded, best)) {
      return Status::kUnsupportedShape;
    }
  }
  if (plan->tile < 0 && excluded != nullptr &&
      choose(plan->table, params, device, nullptr).tile >= 0) {
    return Status::kExcludedTile;
  }
  if (plan->tile < 0 || !serves(table.tiles[plan->tile], params, device)) {
    return Status::kUnsupportedShape;
  }
  const GemmTile& tile = table.tiles[plan->tile];
  const int64_t most = std::min<int64_t>(tile.most_splits, divide_up(params.k, tile.k));
  if (params.splits > tile.most_splits) return Status::kUnsupportedShape;
  const int64_t splits =
      asked > 0 ? std::min(asked, most) : best_splits(tile, table.machine, params, device);
  plan->splits = static_cast<int32_t>(splits);
  plan->launches = 1;
  plan->tiles = tiles_of(tile, params);
  plan->blocks = plan->tiles * splits;
  if (plan->blocks > kMaxBlocks) return Status::kUnsupportedShape;
  plan->shared_bytes = shared_bytes(tile);
  plan->expected_clocks = expected_cost(tile, table.machine, params, device, splits).clocks;
  if (splits > 1) {
    plan->counter_bytes = split_counter_bytes(plan->tiles);
    plan->workspace_bytes = split_workspace_bytes(tile, plan->tiles, plan->splits);
  }
  return Status::kSuccess;
}

}  // namespace

const GemmTableView& gemm_table(GemmTable table) {
  return *kGemmTableViews[static_cast<int>(table)];
}

bool has_measured() { return current.load(std::memory_order_acquire) != nullptr; }

const GemmMeasured* find_measured(GemmTable table, int32_t sms, int64_t m, int64_t n, int64_t k) {
  const Choices* choices = current.load(std::memory_order_acquire);
  if (choices == nullptr || choices->table != table || choices->sms != sms) return nullptr;
  const auto begin = choices->rows.begin(), end = choices->rows.end();
  const auto serves = [&](const GemmMeasured& row) {
    return row.n == n && row.k == k && is_near(row.m, m);
  };
  const auto found = std::lower_bound(begin, end, GemmMeasured{n, k, m, 0, 0}, before);
  if (found != end && serves(*found)) return &*found;
  // If every row of this n and k has fewer tokens, the last of them may serve.
  const bool last = found == end || found->n != n || found->k != k;
  return last && found != begin && serves(*(found - 1)) ? &*(found - 1) : nullptr;
}

Status plan_gemm(const GemmParams& params, const Device& device, GemmPlan* plan) {
  const GemmMeasured* found = nullptr;
  // What was measured are int8 weights.
  if (has_measured() && !is_w4(params) && params.tile < 0 && params.splits == 0) {
    found = find_measured(table_of(device), device.sms, params.m, params.n, params.k);
  }
  return make_plan(params, device, found, plan);
}

Status plan_by_rules(const GemmParams& params, const Device& device, GemmPlan* plan) {
  return make_plan(params, device, nullptr, plan);
}

}  // namespace sqk

// Without a device, plans for the current GPU and adds CUTLASS's workspace (launch.cu).
extern "C" int32_t sqk_gemm_plan(const sqk::GemmParams* params, const sqk::Device* device,
                                 sqk::GemmPlan* plan) {
  return static_cast<int32_t>(device == nullptr ? sqk::plan(*params, plan)
                                                : sqk::plan_gemm(*params, *device, plan));
}

extern "C" int32_t sqk_gemm_use_measured(sqk::GemmTable table, int32_t sms,
                                         const sqk::GemmMeasured* rows, int64_t count) {
  using sqk::Status;
  const auto index = static_cast<int32_t>(table);
  if (index < 0 || index >= sqk::kGemmTables || count < 0 || (count > 0 && rows == nullptr)) {
    return static_cast<int32_t>(Status::kInvalidArgument);
  }
  const auto sound = [&](const sqk::GemmMeasured& row) {
    return sqk::sound(sqk::gemm_table(table), row);
  };
  const auto same = [](const sqk::GemmMeasured& a, const sqk::GemmMeasured& b) {
    return std::tie(a.n, a.k, a.m) == std::tie(b.n, b.k, b.m);
  };
  auto choices = std::make_unique<sqk::Choices>();
  *choices = {table, sms, {rows, rows + count}};
  std::sort(choices->rows.begin(), choices->rows.end(), sqk::before);
  if (!std::all_of(choices->rows.begin(), choices->rows.end(), sound) ||
      std::adjacent_find(choices->rows.begin(), choices->rows.end(), same) != choices->rows.end()) {
    return static_cast<int32_t>(Status::kInvalidArgument);
  }
  // Earlier lists are kept, because a plan on another thread may be reading one. Each call adds
  // one.
  static std::mutex mutex;
  static std::vector<std::unique_ptr<const sqk::Choices>> all;
  const std::lock_guard<std::mutex> lock(mutex);
  sqk::current.store(count > 0 ? choices.get() : nullptr, std::memory_order_release);
  all.push_back(std::move(choices));
  return static_cast<int32_t>(Status::kSuccess);
}
