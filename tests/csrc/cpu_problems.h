// Random problems for the CPU kernels, and the specification that their results are compared with:
// loops that follow docs/internals/numerics.md. Included by cpu_kernels.cpp only.
#pragma once

#include <algorithm>
#include <cmath>
#include <random>
#include <vector>

#include "sqk/linear.h"

namespace {

using sqk::DType;
using sqk::Producer;
using sqk::Scheme;
using sqk::Status;

std::mt19937 random_bits;

int64_t pick(std::initializer_list<int64_t> of) { return of.begin()[random_bits() % of.size()]; }
bool chance(int percent) { return static_cast<int>(random_bits() % 100) < percent; }
float normal() { return std::normal_distribution<float>()(random_bits); }
int8_t any_int8() { return static_cast<int8_t>(random_bits() % 256); }

template <typename T, typename Make>
std::vector<T> filled(int64_t size, Make make) {
  std::vector<T> values(static_cast<size_t>(size));
  for (T& value : values) value = make();
  return values;
}

// --- the specification ---------------------------------------------------------------------------

constexpr float kSmallest = 1.17549435e-38f;

float inverse(float scale) { return scale >= kSmallest && std::isfinite(scale) ? 1 / scale : 0; }

int8_t round_to_int8(float v) {
  if (std::isnan(v)) return 0;
  return static_cast<int8_t>(std::min(127.0f, std::max(-127.0f, std::nearbyintf(v))));
}

float act(Producer producer, float x) {
  const double t = x;
  switch (producer) {
    case Producer::kRelu:
      return static_cast<float>(t < 0 ? 0 : t);
    case Producer::kGelu:
      return static_cast<float>(t * 0.5 * (1 + std::erf(t * std::sqrt(0.5))));
    case Producer::kGeluTanh:
      return static_cast<float>(0.5 * t *
                                (1 + std::tanh(std::sqrt(2 / M_PI) * (t + 0.044715 * t * t * t))));
    default:
      return static_cast<float>(t / (1 + std::exp(-t)));
  }
}

struct Problem {
  int64_t m, n, k;
  Producer producer;
  Scheme scheme;
  int32_t rotation;
  bool relu;
  DType y_dtype;  // float32 or int8; the tests in Python take all types
  std::vector<float> x, other, sum, weight, bias, inv_smooth, scale;
  std::vector<float> w_scale, y_bias, residual, x_scale, out_scale;
  std::vector<int8_t> w_q, x_q;
  // The weight once more in 4 bits, as GemmParams has it, if it is made of such.
  std::vector<int8_t> w_q4, w_group;
  Producer activation;  // of the gated product of the same operands; kQuantize: there is none
  DType gate_dtype;
  std::vector<float> gate_smooth, gate_scale;
};

// Makes w_q of values 0 to 15 with a step and an offset for each group. Values beyond k are random.
void make_w4(Problem& p) {
  const int64_t groups = sqk::w4_groups(p.k);
  const bool largest = chance(20);
  p.w_q4 = filled<int8_t>(p.n * groups * sqk::kW4Bytes, any_int8);
  if (largest) std::fill(p.w_q4.begin(), p.w_q4.end(), static_cast<int8_t>(-1));
  for (int64_t i = 0; i < groups * p.n; ++i) {
    const int64_t step = largest ? 15 : static_cast<int64_t>(random_bits() % 16);
    p.w_group.push_back(static_cast<int8_t>(step));
    p.w_group.push_back(static_cast<int8_t>(
        static_cast<int64_t>(random_bits() % static_cast<unsigned>(256 - 15 * step)) - 128));
  }
  for (int64_t n = 0; n < p.n; ++n) {
    for (int64_t k = 0; k < p.k; ++k) {
      const int64_t group = k / sqk::kW4Group, i = k % 128 / 32, t = k % 16 / 4, j = k % 4;
      const auto byte =
          static_cast<uint8_t>(p.w_q4[(n * groups + group) * sqk::kW4Bytes + 16 * t + 4 * i + j]);
      const int value = k % 32 < 16 ? byte % 16 : byte / 16;
      const int8_t* const own = &p.w_group[2 * (group * p.n + n)];
      p.w_q[n * p.k + k] = static_cast<int8_t>(value * own[0] + own[1]);
    }
  }
}

Problem make_problem() {
  Problem p = {};
  p.rotation = static_cast<int32_t>(chance(50) ? 0 : pick({2, 4, 8, 16, 32, 64, 128, 256, 512}));
  p.k = p.rotation ? p.rotation * pick({1, 2, 3}) : pick({1, 3, 15, 31, 63, 64, 65, 200, 576});
  p.m = pick({0, 1, 2, 3, 5, 16, 17, 40, 300});
  p.n = pick({1, 2, 5, 6, 7, 16, 17, 33, 48, 49, 130});
  // Longer than what is added up at a time, and the longest at all, whose shifted sums wrap around.
  if (chance(4)) p.k = 4096 + (p.rotation ? p.rotation : 70);
  if (chance(2)) {
    p.rotation = 0;
    p.k = sqk::kMaxGemmK;
    p.m = pick({1, 9});
    p.n = 7;
  }
  p.producer = static_cast<Producer>(chance(50) ? 0 : random_bits() % sqk::kProducers);
  p.scheme = static_cast<Scheme>(random_bits() % 3);
  const float size = static_cast<float>(pick({1, 100}));
  p.x = filled<float>(p.m * p.k, [&] { return size * normal(); });
  if (p.m > 0 && chance(30)) {
    p.x[random_bits() % p.x.size()] = chance(50) ? std::nanf("") : -INFINITY;
  }
  if (p.m > 0 && chance(20)) std::fill(p.x.begin(), p.x.begin() + p.k, 0.0f);
  const bool norm = sqk::is_norm(p.producer);
  if (p.producer != Producer::kQuantize && chance(50)) p.other = filled<float>(p.m * p.k, normal);
  if (norm && !p.other.empty()) p.sum.resize(p.x.size());
  if (norm && chance(70)) p.weight = filled<float>(p.k, normal);
  if (p.producer == Producer::kLayerNorm && chance(70)) p.bias = filled<float>(p.k, normal);
  if (chance(50)) p.inv_smooth = filled<float>(p.k, [] { return 0.5f + std::fabs(normal()); });
  if (p.scheme == Scheme::kStatic) p.scale = {0.01f * size};
  p.w_q = filled<int8_t>(p.n * p.k, any_int8);
  p.x_q = filled<int8_t>(p.m * p.k, any_int8);
  if (chance(20)) {
    std::fill(p.w_q.begin(), p.w_q.end(), static_cast<int8_t>(-128));
    std::fill(p.x_q.begin(), p.x_q.end(), static_cast<int8_t>(chance(50) ? 127 : -128));
  }
  p.x_scale = filled<float>(chance(70) ? std::max<int64_t>(p.m, 1) : 1, normal);
  p.w_scale = filled<float>(chance(70) ? p.n : 1, normal);
  if (chance(60)) p.y_bias = filled<float>(p.n, [] { return 100 * normal(); });
  p.y_dtype = chance(30) ? DType::kInt8 : DType::kFloat32;
  if (p.y_dtype == DType::kInt8) {
    p.out_scale = {2000.0f};
    p.relu = chance(50);
  } else if (chance(50)) {
    p.residual = filled<float>(p.m * p.n, normal);
  }
  if (p.y_dtype == DType::kInt8 && p.n % 2 == 0) {
    p.activation = static_cast<Producer>(
        pick({static_cast<int64_t>(Producer::kSilu), static_cast<int64_t>(Producer::kGelu),
              static_cast<int64_t>(Producer::kGeluTanh)}));
    p.gate_dtype = static_cast<DType>(
        pick({static_cast<int64_t>(DType::kFloat32), static_cast<int64_t>(DType::kFloat16),
              static_cast<int64_t>(DType::kBFloat16)}));
    // Products of some units, where the activations bend.
    for (float& scale : p.w_scale) scale /= 2e4f * std::sqrt(static_cast<float>(p.k));
    for (float& bias : p.y_bias) bias /= 100;
    if (chance(30)) p.x_scale[0] = chance(50) ? std::nanf("") : INFINITY;
    if (chance(50)) p.gate_smooth = filled<float>(p.n / 2, [] { return std::fabs(normal()); });
    p.gate_scale = {0.01f};
    p.out_scale = {0.05f};
  }
  if (p.y_dtype != DType::kInt8 && chance(60)) make_w4(p);
  return p;
}

// v of a row: before the rotation, in place of x.
std::vector<float> values_of(const Problem& p, int64_t row) {
  std::vector<float> v(p.x.begin() + row * p.k, p.x.begin() + (row + 1) * p.k);
  const float* other = p.other.empty() ? nullptr : p.other.data() + row * p.k;
  if (sqk::is_norm(p.producer)) {
    for (int64_t i = 0; other && i < p.k; ++i) v[i] += other[i];
    double mean = 0, squares = 0;
    if (p.producer == Producer::kLayerNorm) {
      for (float x : v) mean += x;
      mean /= static_cast<double>(p.k);
    }
    for (float x : v) squares += (x - mean) * (x - mean);
    const auto rstd = static_cast<float>(1 / std::sqrt(squares / static_cast<double>(p.k) + 1e-5));
    for (int64_t i = 0; i < p.k; ++i) {
      v[i] = (v[i] - static_cast<float>(mean)) * rstd;
      if (!p.weight.empty()) v[i] *= p.weight[i];
      if (!p.bias.empty()) v[i] += p.bias[i];
    }
  } else if (p.producer != Producer::kQuantize) {
    for (int64_t i = 0; i < p.k; ++i) {
      v[i] = other ? act(p.producer, other[i]) * v[i] : act(p.producer, v[i]);
    }
  }
  for (int64_t i = 0; !p.inv_smooth.empty() && i < p.k; ++i) v[i] *= p.inv_smooth[i];
  for (int64_t h = 1; h < p.rotation; h *= 2) {
    for (int64_t i = 0; i < p.k; ++i) {
      if (i % (2 * h) >= h) continue;
      const float low = v[i], high = v[i + h];
      v[i] = low + high;
      v[i + h] = low - high;
    }
  }
  return v;
}

struct Quantized {
  std::vector<int8_t> x_q;
  std::vector<float> x_scale;
};

Quantized quantized(const Problem& p) {
  std::vector<std::vector<float>> rows;
  std::vector<float> absmax;
  float largest = 0;
  for (int64_t row = 0; row < p.m; ++row) {
    rows.push_back(values_of(p, row));
    float most = 0;
    for (float v : rows.back()) most = std::fabs(v) > most || std::isnan(v) ? std::fabs(v) : most;
    for (float v : rows.back()) most = std::isnan(v) ? v : most;
    absmax.push_back(most);
    largest = std::isnan(largest) || !(most <= largest) ? (std::isnan(largest) ? largest : most)
                                                        : largest;
  }
  Quantized found;
  if (p.scheme == Scheme::kPerTensor) absmax.assign(absmax.size(), largest);
  for (int64_t row = 0; row < p.m; ++row) {
    float scale = absmax[row] / 127.0f;
    if (scale < kSmallest) scale = 0;
    float factor = inverse(scale);
    if (p.scheme == Scheme::kStatic) {
      scale = std::isfinite(absmax[row]) ? p.scale[0] : std::nanf("");
      factor = inverse(p.scale[0]);
    }
    found.x_scale.push_back(scale);
    for (float v : rows[row]) found.x_q.push_back(round_to_int8(v * factor));
  }
  return found;
}

// One value of the product, with the bias.
float dequantized(const Problem& p, const std::vector<int8_t>& x_q,
                  const std::vector<float>& x_scale, int64_t m, int64_t n) {
  int64_t sum = 0;
  for (int64_t k = 0; k < p.k; ++k) sum += x_q[m * p.k + k] * p.w_q[n * p.k + k];
  const float scaled = static_cast<float>(sum) * p.w_scale[p.w_scale.size() > 1 ? n : 0];
  const float own = x_scale[x_scale.size() > 1 ? m : 0];
  return p.y_bias.empty() ? scaled * own : std::fma(scaled, own, p.y_bias[n]);
}

// y of rows of int8 as floats, or int8 values as floats.
std::vector<float> product(const Problem& p, const std::vector<int8_t>& x_q,
                           const std::vector<float>& x_scale) {
  std::vector<float> y;
  for (int64_t m = 0; m < p.m; ++m) {
    for (int64_t n = 0; n < p.n; ++n) {
      float v = dequantized(p, x_q, x_scale, m, n);
      if (!p.residual.empty()) v += p.residual[m * p.n + n];
      if (p.relu && v < 0) v = 0;
      y.push_back(p.y_dtype == DType::kInt8 ? round_to_int8(v * inverse(p.out_scale[0])) : v);
    }
  }
  return y;
}

// To the nearest float16 or bfloat16, of 11 and 8 bits.
float rounded_to(DType dtype, float v) {
  if (dtype == DType::kFloat32 || !std::isfinite(v) || v == 0) return v;
  const bool half = dtype == DType::kFloat16;
  const int exponent = std::max(std::ilogb(v), half ? -14 : -126);
  const float step = std::ldexp(1.0f, exponent - (half ? 10 : 7));
  const float rounded = std::nearbyint(v / step) * step;
  return half && std::fabs(rounded) > 65504 ? std::copysign(INFINITY, v) : rounded;
}

struct Gated {
  std::vector<float> y, y_scale;
};

Gated gated(const Problem& p) {
  Gated found;
  const int64_t channels = p.n / 2;
  for (int64_t m = 0; m < p.m; ++m) {
    found.y_scale.push_back(p.gate_scale[0]);
    for (int64_t c = 0; c < channels; ++c) {
      const int64_t block = c / sqk::kGateBlock * sqk::kGateBlock;
      const int64_t rows = std::min<int64_t>(sqk::kGateBlock, channels - block);
      const int64_t gate = block + c;  // 2 * block rows are before the block, c - block in it
      const auto value = [&](int64_t n) {
        return rounded_to(p.gate_dtype, dequantized(p, p.x_q, p.x_scale, m, n));
      };
      float u = act(p.activation, value(gate)) * value(gate + rows);
      if (!p.gate_smooth.empty()) u *= p.gate_smooth[c];
      if (!std::isfinite(u)) found.y_scale.back() = std::nanf("");
      found.y.push_back(round_to_int8(u * inverse(p.gate_scale[0])));
    }
  }
  return found;
}

}  // namespace
