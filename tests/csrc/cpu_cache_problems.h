// Random calls of the kernels with an int8 cache, and the specification that their results are
// compared with. Included by cpu_kernels.cpp only, after cpu_problems.h.
#pragma once

#include <tuple>
#include <utility>

#include "common/arithmetic.h"
#include "sqk/attention.h"
#include "sqk/kv_cache.h"

namespace {

struct CacheProblem {
  int64_t batch, heads, group, tokens, dim, size, blocks, entries, rope, window;
  int32_t rotation;
  bool is_static, ring;
  float score_scale;
  std::vector<float> k, v, q, k_factor, v_factor, k_inverse, v_inverse, cos, sin;
  std::vector<int32_t> table, positions, lengths;
  std::vector<uint8_t> mask;  // [batch, 1, tokens, capacity]
  std::vector<int8_t> k_cache, v_cache;
  std::vector<float> k_scale, v_scale;

  int64_t width() const { return sqk::padded_head(dim); }
  int64_t positions_of() const { return size * (table.empty() ? 1 : entries); }
  int64_t slot(int64_t b, int64_t head, int64_t position) const {  // of all tokens of all heads
    const int64_t block = table.empty() ? b : table[b * entries + position / size];
    return (block * heads + head) * size + position % size;
  }
};

CacheProblem make_cache_problem() {
  CacheProblem p = {};
  p.batch = pick({1, 2, 3});
  p.heads = pick({1, 2});
  p.group = pick({1, 2, 3, 5, 9});
  p.tokens = pick({1, 1, 2, 8});
  p.dim = pick({1, 15, 16, 20, 64, 80, 96, 128, 256});
  p.rotation = static_cast<int32_t>(chance(50) ? 0 : p.dim & -p.dim);
  if (p.rotation < 2) p.rotation = 0;
  p.is_static = p.rotation == 0 && chance(40);
  const bool paged = chance(40);
  p.ring = !paged && chance(40);
  p.size = paged ? pick({1, 5, 16, 64}) : pick({8, 65, 300, 1100});
  p.entries = paged ? std::max<int64_t>(sqk::divide_up(p.tokens, p.size), pick({1, 4, 9})) : 1;
  p.blocks = paged ? p.batch * p.entries + 2 : p.batch;
  const int64_t capacity = p.size * p.entries;
  for (int32_t i = 0; paged && i < p.batch * p.entries; ++i) p.table.push_back(i + 2);
  std::shuffle(p.table.begin(), p.table.end(), random_bits);
  for (int64_t b = 0; b < p.batch; ++b) {
    const int64_t most = p.ring ? 3 * capacity : capacity;
    const int64_t length = p.tokens + static_cast<int64_t>(random_bits() % (most - p.tokens + 1));
    p.lengths.push_back(static_cast<int32_t>(length));
    p.positions.push_back(static_cast<int32_t>(length - p.tokens));
  }
  const auto numbers = [&](int64_t rows) { return filled<float>(rows * p.dim, normal); };
  p.k = numbers(p.batch * p.heads * p.tokens);
  p.v = numbers(p.batch * p.heads * p.tokens);
  p.q = numbers(p.batch * p.heads * p.group * p.tokens);
  if (chance(20)) p.k[random_bits() % p.k.size()] = chance(50) ? std::nanf("") : INFINITY;
  if (p.is_static || chance(40)) {
    const float size = p.is_static ? 0.02f : 1.0f;
    for (auto* of : {&p.k_factor, &p.v_factor}) {
      *of = filled<float>(p.heads * p.dim, [&] { return size * (0.5f + std::fabs(normal())); });
    }
    for (float factor : p.k_factor) p.k_inverse.push_back(1 / factor);
    for (float factor : p.v_factor) p.v_inverse.push_back(1 / factor);
  }
  if (p.dim >= 2 && chance(40)) {
    p.rope = std::max<int64_t>(2, p.dim / pick({1, 2}) / 2 * 2);
    p.cos = filled<float>(p.tokens * p.rope, normal);
    p.sin = filled<float>(p.tokens * p.rope, normal);
  }
  p.window = chance(30) ? pick({1, 7, 600}) : 0;
  p.score_scale = 1 / std::sqrt(static_cast<float>(p.dim));
  if (chance(40)) {
    p.mask = filled<uint8_t>(p.batch * p.tokens * capacity, [] { return chance(60); });
  }
  const int64_t all = p.blocks * p.heads * p.size;
  const auto int8 = [] { return static_cast<int8_t>(std::max<int>(any_int8(), -127)); };
  p.k_cache = filled<int8_t>(all * p.width(), int8);
  p.v_cache = filled<int8_t>(all * p.width(), int8);
  if (!p.is_static) {
    p.k_scale = filled<float>(all, [] { return 0.01f + 0.01f * std::fabs(normal()); });
    p.v_scale = filled<float>(all, [] { return 0.01f + 0.01f * std::fabs(normal()); });
  }
  return p;
}

// Factors, rotation, scale and rounding of one head of one token. Returns the scale.
float quantize_head(const CacheProblem& p, std::vector<float> v, const float* factor, bool fixed,
                    int8_t* to) {
  for (int64_t i = 0; factor != nullptr && i < p.dim; ++i) v[i] *= factor[i];
  for (int64_t h = 1; h < p.rotation; h *= 2) {
    for (int64_t i = 0; i < p.dim; ++i) {
      if (i % (2 * h) >= h) continue;
      const float low = v[i], high = v[i + h];
      v[i] = low + high;
      v[i + h] = low - high;
    }
  }
  float most = 0;
  for (float x : v)
    most = std::isnan(x) || std::isnan(most) ? std::nanf("") : std::max(most, std::fabs(x));
  float scale = most / 127.0f;
  if (scale < kSmallest) scale = 0;
  const float by = fixed ? 1.0f : inverse(scale);
  for (int64_t i = 0; i < p.dim; ++i) to[i] = round_to_int8(v[i] * by);
  return scale;
}

void append_expected(CacheProblem& p) {
  for (int64_t row = 0; row < p.batch * p.heads * p.tokens; ++row) {
    const int64_t t = row % p.tokens, head = row / p.tokens % p.heads, b = row / p.tokens / p.heads;
    int64_t position = p.positions[b] + t;
    if (p.ring) position %= p.size;
    const int64_t slot = p.slot(b, head, position);
    std::vector<float> k(p.k.begin() + row * p.dim, p.k.begin() + (row + 1) * p.dim);
    std::vector<float> v(p.v.begin() + row * p.dim, p.v.begin() + (row + 1) * p.dim);
    const std::vector<float> x = k;
    for (int64_t i = 0; i < p.rope; ++i) {
      const int64_t half = p.rope / 2;
      const float other = i < half ? -x[i + half] : x[i - half];
      k[i] = x[i] * p.cos[t * p.rope + i] + other * p.sin[t * p.rope + i];
    }
    for (auto [cache, scales, values, inverses] :
         {std::tuple{&p.k_cache, &p.k_scale, &k, &p.k_inverse},
          std::tuple{&p.v_cache, &p.v_scale, &v, &p.v_inverse}}) {
      int8_t* to = cache->data() + slot * p.width();
      std::fill(to, to + p.width(), int8_t{0});
      const float* factor = inverses->empty() ? nullptr : inverses->data() + head * p.dim;
      const float scale = quantize_head(p, *values, factor, p.is_static, to);
      if (!p.is_static) (*scales)[slot] = scale;
    }
  }
}

// One output in double, and how far from it a kernel may be.
struct Output {
  std::vector<double> y, bound;
};

Output attention_expected(const CacheProblem& p) {
  Output found;
  const int64_t capacity = p.positions_of();
  const int64_t rows = p.batch * p.heads * p.group * p.tokens;
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t t = row % p.tokens, of = row / p.tokens % (p.heads * p.group);
    const int64_t head = of / p.group, b = row / p.tokens / (p.heads * p.group);
    std::vector<int8_t> q(p.dim);
    const float* factor = p.k_factor.empty() ? nullptr : p.k_factor.data() + head * p.dim;
    const float groups = std::max(p.rotation, 1);
    const float q_scale =
        quantize_head(p, {p.q.begin() + row * p.dim, p.q.begin() + (row + 1) * p.dim}, factor,
                      false, q.data()) *
        (p.score_scale / groups);
    const int64_t oldest = p.ring ? std::max<int64_t>(p.lengths[b] - capacity, 0) : 0;
    const int64_t newest = p.lengths[b] - p.tokens + t;
    double most = -INFINITY;
    std::vector<std::pair<int64_t, double>> scores;  // of slots
    for (int64_t position = oldest; position <= newest; ++position) {
      const int64_t column = position - oldest;
      if (column >= capacity || (p.window > 0 && position <= newest - p.window)) continue;
      if (!p.mask.empty() && !p.mask[(b * p.tokens + t) * capacity + column]) continue;
      const int64_t slot = p.slot(b, head, p.ring ? position % p.size : position);
      int32_t sum = 0;
      for (int64_t i = 0; i < p.dim; ++i) sum += q[i] * p.k_cache[slot * p.width() + i];
      const float scaled = static_cast<float>(sum) * (p.is_static ? 1.0f : p.k_scale[slot]);
      scores.emplace_back(slot, scaled * q_scale);
      most = std::max(most, scores.back().second);
    }
    std::vector<double> y(p.dim), size(p.dim);
    double total = 0;
    for (const auto& [slot, score] : scores) {
      const double weight = std::exp(score - most);
      total += weight;
      for (int64_t i = 0; i < p.dim; ++i) {
        const double value = p.v_cache[slot * p.width() + i] *
                             static_cast<double>(p.is_static ? 1.0f : p.v_scale[slot]);
        y[i] += weight * value;
        // Roundings of float32: of the exponent, 300 of sums, exp's own.
        size[i] += weight * std::fabs(value) * 0x1p-24 * (std::fabs(score - most) + 400);
      }
    }
    for (int64_t i = 0; !scores.empty() && i < p.dim; ++i) y[i] /= total, size[i] /= total;
    for (int64_t h = 1; h < p.rotation; h *= 2) {
      for (int64_t i = 0; i < p.dim; ++i) {
        if (i % (2 * h) >= h) continue;
        const double low = y[i], high = y[i + h], sum = size[i] + size[i + h];
        y[i] = low + high;
        y[i + h] = low - high;
        size[i] = size[i + h] = sum + 0x1p-22 * (std::fabs(low) + std::fabs(high));
      }
    }
    for (int64_t i = 0; i < p.dim; ++i) {
      const double by = (p.v_factor.empty() ? 1.0 : p.v_factor[head * p.dim + i]) / groups;
      found.y.push_back(y[i] * by);
      found.bound.push_back(size[i] * by + 0x1p-22 * std::fabs(y[i] * by) + 0x1p-120);
    }
  }
  return found;
}

}  // namespace
