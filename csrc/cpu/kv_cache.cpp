// The writer of an int8 cache. CPU ring: no torch, no CUDA.
#include "sqk/kv_cache.h"

#include <cstring>

#include "cpu/cache.h"
#include "cpu/layer.h"

namespace sqk {
namespace {

bool is_valid(const KvAppendParams& p) {
  const bool some = p.batch > 0 && p.tokens > 0;
  // An empty tensor of scales has no address, so it looks like static scales.
  const bool is_static = p.cache.k.scale == nullptr && p.cache.blocks * p.cache.block_size > 0;
  return is_float(p.dtype) && p.batch >= 0 && p.tokens >= 0 &&
         (!some || (p.k.data != nullptr && p.v.data != nullptr)) &&
         (!some || is_valid(p.cache, p.batch, p.rotation)) &&
         (!some || !is_static || (p.k.inv_smooth != nullptr && p.v.inv_smooth != nullptr)) &&
         (p.cache.ring == 0 || p.tokens <= p.cache.block_size) &&
         (p.cos == nullptr) == (p.sin == nullptr) &&
         (p.cos == nullptr || (is_float(p.rope_dtype) && p.rope_dim % 2 == 0 && p.rope_dim >= 2 &&
                               p.rope_dim <= p.cache.k.dim));
}

// Where a task computes: rows of at most kMaxHead values, padded with zeros.
struct Row {
  alignas(64) float of[kMaxHead];
};
static_assert(kMaxHead % kVector == 0);

QuantizeParams row_params(DType dtype, int64_t size, const void* x) {
  QuantizeParams q = {};
  q.producer = Producer::kQuantize;
  q.dtype = dtype;
  q.m = 1;
  q.k = size;
  q.x = x;
  return q;
}

const void* element(const void* data, DType dtype, int64_t index) {
  return static_cast<const char*>(data) + index * size_in_bytes(dtype);
}

// The rotary embedding of a token: cos and sin as float32.
struct Rope {
  Row cos, sin, x;

  void load(const Kernels& kernels, const KvAppendParams& p, int64_t sequence, int64_t token) {
    const int64_t c = sequence * p.cos_batch_stride + token * p.cos_token_stride;
    const int64_t s = sequence * p.sin_batch_stride + token * p.sin_token_stride;
    const DType dtype = p.rope_dtype;
    kernels.values(row_params(dtype, p.rope_dim, element(p.cos, dtype, c)), 0, cos.of);
    kernels.values(row_params(dtype, p.rope_dim, element(p.sin, dtype, s)), 0, sin.of);
  }

  // Two products and a sum for each channel, rounded one by one.
  const float* turn(const Kernels& kernels, const QuantizeParams& given, int64_t dim) {
    Row& from = x;
    kernels.values(given, 0, from.of);
    const int64_t half = dim / 2;
    for (int64_t i = 0; i < half; ++i) {
      const float low = from.of[i], high = from.of[i + half];
      from.of[i] = low * cos.of[i] - high * sin.of[i];
      from.of[i + half] = high * cos.of[i + half] + low * sin.of[i + half];
    }
    return from.of;
  }
};

// Writes one token of a head: the values `given`, smoothed and rotated.
void write_token(const Kernels& kernels, const QuantizeParams& given, const KvHalf& half,
                 const Slots& slot, int64_t head) {
  Row v;
  alignas(64) int8_t x_q[kMaxHead];
  const uint32_t absmax = kernels.values(given, 0, v.of);
  float inverse = 1.0f;  // static scales are the factors
  bool ordinary = false;
  if (half.scale != nullptr) {
    const float scale = scale_of(absmax);
    *slot.scale(half, head) = scale;
    inverse = inverse_of(scale);
    ordinary = is_finite_bits(absmax);
  }
  kernels.round(v.of, round_up(half.dim, kVector), inverse, ordinary, x_q);
  std::memcpy(slot.at(half, head), x_q, static_cast<size_t>(padded_head(half.dim)));
}

// Writes token `token` of a sequence, all heads.
void append_token(const Kernels& kernels, const KvAppendParams& p, int64_t sequence, int64_t token,
                  int64_t first_head, int64_t last_head, Rope& rope) {
  const KvCache& cache = p.cache;
  const int64_t start = p.positions != nullptr ? p.positions[sequence] : 0;
  const int64_t position = start + token;
  if (start < 0 || (position >= capacity(cache) && cache.ring == 0)) return;
  const Slots slot = slots_of(cache, sequence, position, 1);
  if (slot.block < 0 || slot.block >= cache.blocks) return;
  if (p.cos != nullptr) rope.load(kernels, p, sequence, token);
  for (int64_t head = first_head; head < last_head; ++head) {
    const auto given = [&](const KvTokens& tokens, const KvHalf& half) {
      const int64_t index =
          sequence * tokens.batch_stride + head * tokens.head_stride + token * tokens.token_stride;
      return row_params(p.dtype, half.dim, element(tokens.data, p.dtype, index));
    };
    const auto smooth = [&](QuantizeParams& row, const KvTokens& tokens) {
      if (tokens.inv_smooth != nullptr) row.inv_smooth = tokens.inv_smooth + head * row.k;
      row.rotation = p.rotation;
    };
    QuantizeParams k = given(p.k, cache.k), v = given(p.v, cache.v);
    if (p.cos != nullptr) {
      k.x = rope.turn(kernels, k, p.rope_dim);
      k.dtype = DType::kFloat32;
    }
    smooth(k, p.k);
    smooth(v, p.v);
    write_token(kernels, k, cache.k, slot, head);
    write_token(kernels, v, cache.v, slot, head);
  }
}

}  // namespace

Status kv_append(const KvAppendParams& p, cudaStream_t stream) {
  if (!is_valid(p)) return Status::kInvalidArgument;
  const Kernels& level = kernels();
  const int64_t heads = p.cache.heads, rows = p.batch * p.tokens * heads;
  if (rows == 0 || capacity(p.cache) == 0) return Status::kSuccess;
  const int64_t tasks =
      quantizer_tasks(rows, rows * (p.cache.k.dim + p.cache.v.dim), thread_count(stream));
  parallel(stream, tasks, [&](int64_t task) {
    Rope rope;
    const Range range = Range::of(rows, 1, tasks, task);
    for (int64_t row = range.begin; row < range.end;) {
      const int64_t unit = row / heads, head = row % heads;
      const int64_t last = heads < head + range.end - row ? heads : head + range.end - row;
      append_token(level, p, unit / p.tokens, unit % p.tokens, head, last, rope);
      row += last - head;
    }
  });
  return Status::kSuccess;
}

}  // namespace sqk

extern "C" int32_t sqk_kv_append(const sqk::KvAppendParams* params, void* stream) {
  return static_cast<int32_t>(sqk::kv_append(*params, static_cast<cudaStream_t>(stream)));
}
