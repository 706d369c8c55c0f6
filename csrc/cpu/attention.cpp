// Attention to an int8 cache, split over the sequence. CPU ring: no torch, no CUDA.
//
// A part is some columns of a sequence and a head of the cache. Which columns make a part follows
// from the capacity alone, and parts are merged from the oldest to the newest. So the bits of an
// output depend neither on the threads nor on the other sequences and tokens of the call.
#include "sqk/attention.h"

#include <algorithm>
#include <cstring>

#include "common/entry.h"
#include "cpu/cache.h"
#include "cpu/layer.h"

namespace sqk {
namespace {

constexpr int64_t kLeastPart = 2 * kTokenTile;
constexpr int64_t kMostParts = 64;

bool is_valid(const AttentionParams& p) {
  const bool is_static = p.cache.k.scale == nullptr && p.cache.blocks * p.cache.block_size > 0;
  const bool some = p.batch > 0 && p.tokens > 0;
  return is_float(p.dtype) && p.batch >= 0 && p.heads >= 1 && p.tokens >= 0 &&
         p.tokens <= kMaxQueryTokens && p.window >= 0 && p.cache.heads >= 1 &&
         p.heads % p.cache.heads == 0 && p.cache.k.dim == p.cache.v.dim &&
         (!some || is_valid(p.cache, p.batch, p.rotation)) &&
         (!some || (p.q != nullptr && p.y != nullptr)) &&
         (!some || !is_static || (p.k_smooth != nullptr && p.v_smooth != nullptr));
}

// The sizes of a call and its buffers, functions of its sizes.
struct Division {
  int64_t group;  // query rows of a head of the cache
  int64_t rows;   // of all
  int64_t part_columns, parts;
  int64_t states;  // floats of a query's state

  explicit Division(const AttentionParams& p)
      : group(p.heads / p.cache.heads * p.tokens), rows(p.batch * p.heads * p.tokens) {
    const int64_t columns = capacity(p.cache);
    part_columns = std::max(kLeastPart, round_up(divide_up(columns, kMostParts), kTokenTile));
    parts = divide_up(columns, part_columns);
    states = state_floats(p.cache.v.dim);
  }

  int64_t q_bytes() const { return buffer_bytes(rows * kMaxHead); }
  int64_t scale_bytes() const { return buffer_bytes(rows * int64_t{sizeof(float)}); }
  int64_t state_bytes() const {
    return buffer_bytes(rows * parts * states * int64_t{sizeof(float)});
  }
};

// The columns of a sequence that any of its queries may read.
struct Columns {
  int64_t oldest;  // position of column 0
  int64_t newest;  // column of the last query token
  int64_t begin, end;

  Columns(const AttentionParams& p, int64_t sequence) {
    const int64_t size = capacity(p.cache);
    const int64_t length = p.lengths != nullptr ? p.lengths[sequence] : size;
    oldest = p.cache.ring != 0 ? std::max<int64_t>(length - size, 0) : 0;
    newest = length - 1 - oldest;
    end = std::clamp<int64_t>(newest + 1, 0, size);
    begin = p.window > 0 ? std::clamp<int64_t>(newest - p.tokens - p.window + 2, 0, end) : 0;
  }
};

// The parts of a sequence that hold some of these columns.
struct PartRange {
  int64_t first, count;

  PartRange(const Columns& columns, const Division& division)
      : first(columns.begin / division.part_columns), count(0) {
    if (columns.begin < columns.end) {
      count = divide_up(columns.end, division.part_columns) - first;
    }
  }
};

void quantize_query(const Kernels& level, const AttentionParams& p, int64_t row, int8_t* q_q,
                    float* q_scale) {
  const int64_t token = row % p.tokens, head = row / p.tokens % p.heads;
  const int64_t sequence = row / p.tokens / p.heads, dim = p.cache.k.dim;
  const int64_t index =
      sequence * p.q_batch_stride + head * p.q_head_stride + token * p.q_token_stride;
  QuantizeParams q = {};
  q.producer = Producer::kQuantize;
  q.dtype = p.dtype;
  q.m = 1;
  q.k = dim;
  q.x = static_cast<const char*>(p.q) + index * size_in_bytes(p.dtype);
  q.rotation = p.rotation;
  if (p.k_smooth != nullptr) q.inv_smooth = p.k_smooth + head / (p.heads / p.cache.heads) * dim;
  alignas(64) float v[kMaxHead];
  const uint32_t absmax = level.values(q, 0, v);
  const float scale = scale_of(absmax);
  const int64_t padded = round_up(dim, kVector);
  level.round(v, padded, inverse_of(scale), is_finite_bits(absmax), q_q);
  std::memset(q_q + padded, 0, static_cast<size_t>(kMaxHead - padded));
  *q_scale = scale * (p.scale / static_cast<float>(std::max(p.rotation, 1)));
}

}  // namespace

Status plan(const AttentionParams& p, AttentionPlan* plan) {
  *plan = {};
  if (!is_valid(p)) return Status::kInvalidArgument;
  const Division division(p);
  plan->splits = static_cast<int32_t>(division.parts);
  plan->blocks = p.batch * p.cache.heads * division.parts;
  plan->threads = static_cast<int32_t>(std::min<int64_t>(plan->blocks, kMostThreads));
  plan->workspace_bytes = division.q_bytes() + division.scale_bytes() + division.state_bytes();
  return Status::kSuccess;
}

Status decode_attention_s8(const AttentionParams& p, const AttentionPlan& plan,
                           cudaStream_t stream) {
  if (p.workspace_bytes < plan.workspace_bytes) return Status::kWorkspaceTooSmall;
  if (plan.workspace_bytes > 0 && p.workspace == nullptr) return Status::kInvalidArgument;
  const Division division(p);
  if (division.rows == 0) return Status::kSuccess;
  const Kernels& level = kernels();
  auto* const q_q = static_cast<int8_t*>(p.workspace);
  auto* const q_scale = reinterpret_cast<float*>(q_q + division.q_bytes());
  auto* const states = reinterpret_cast<float*>(q_q + division.q_bytes() + division.scale_bytes());
  const int64_t threads = thread_count(stream);

  const int64_t row_tasks = quantizer_tasks(division.rows, division.rows * p.cache.k.dim, threads);
  parallel(stream, row_tasks, [&](int64_t task) {
    const Range range = Range::of(division.rows, 1, row_tasks, task);
    for (int64_t row = range.begin; row < range.end; ++row) {
      quantize_query(level, p, row, q_q + row * kMaxHead, q_scale + row);
    }
  });

  // Each task takes as many of the parts that hold something as any other.
  int64_t units = 0;
  for (int64_t sequence = 0; sequence < p.batch; ++sequence) {
    units += p.cache.heads * PartRange(Columns(p, sequence), division).count;
  }
  const int64_t tasks = std::min(units, threads);
  const int64_t stride = division.group * division.states;  // of a part
  parallel(stream, tasks, [&](int64_t task) {
    const Range range = Range::of(units, 1, tasks, task);
    int64_t unit = 0;
    for (int64_t sequence = 0; sequence < p.batch && unit < range.end; ++sequence) {
      const Columns columns(p, sequence);
      const PartRange parts(columns, division);
      const int64_t own = p.cache.heads * parts.count;
      const int64_t from = std::max(range.begin - unit, int64_t{0});
      for (int64_t i = from; i < std::min(own, range.end - unit); ++i) {
        const int64_t head = i / parts.count, part = parts.first + i % parts.count;
        const int64_t pair = sequence * p.cache.heads + head, row = pair * division.group;
        Part work = {};
        work.params = &p;
        work.sequence = sequence;
        work.head = head;
        // Tiles start at multiples of their size, whatever the window is.
        const int64_t begin = std::max(part * division.part_columns, columns.begin);
        work.begin = begin / kTokenTile * kTokenTile;
        work.end = std::min((part + 1) * division.part_columns, columns.end);
        work.oldest = columns.oldest;
        work.newest = columns.newest;
        work.rows = division.group;
        work.q = q_q + row * kMaxHead;
        work.q_scale = q_scale + row;
        work.states = states + (pair * division.parts + part) * stride;
        level.attend(work);
      }
      unit += own;
    }
  });

  parallel(stream, row_tasks, [&](int64_t task) {
    const Range range = Range::of(division.rows, 1, row_tasks, task);
    for (int64_t row = range.begin; row < range.end; ++row) {
      const int64_t pair = row / division.group, sequence = pair / p.cache.heads;
      const PartRange parts(Columns(p, sequence), division);
      Merge merge = {};
      merge.params = &p;
      merge.states = states + (pair * division.parts + parts.first) * stride +
                     row % division.group * division.states;
      merge.stride = stride;
      merge.parts = parts.count;
      merge.head = pair % p.cache.heads;
      merge.row = row;
      level.merge(merge);
    }
  });
  return Status::kSuccess;
}

}  // namespace sqk

extern "C" int32_t sqk_decode_attention_s8(const sqk::AttentionParams* params, void* stream) {
  return sqk::plan_and_run(*params, stream, &sqk::decode_attention_s8);
}

extern "C" int64_t sqk_attention_workspace_bytes(const sqk::AttentionParams* params) {
  sqk::AttentionPlan made;
  return sqk::plan(*params, &made) == sqk::Status::kSuccess ? made.workspace_bytes : -1;
}
