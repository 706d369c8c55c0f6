// Runs the CPU kernels on random problems at every level of this processor and with several
// threads, and compares with loops that follow docs/internals/numerics.md. Built with sanitizers by
// test_cpu_kernels.py. Every buffer has its exact size, so that a sanitizer sees each access beyond
// it.
//   cpu_kernels SEED PROBLEMS [LEVEL]
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "cpu/levels.h"
#include "cpu/threads.h"
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

// One thread for each task.
void run_in_threads(int64_t tasks, sqk::Task task, void* context) {
  std::vector<std::thread> running;
  for (int64_t i = 0; i < tasks; ++i) running.emplace_back(task, context, i);
  for (std::thread& thread : running) thread.join();
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
};

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

// y of rows of int8 as floats, or int8 values as floats.
std::vector<float> product(const Problem& p, const std::vector<int8_t>& x_q,
                           const std::vector<float>& x_scale) {
  std::vector<float> y;
  for (int64_t m = 0; m < p.m; ++m) {
    for (int64_t n = 0; n < p.n; ++n) {
      int64_t sum = 0;
      for (int64_t k = 0; k < p.k; ++k) sum += x_q[m * p.k + k] * p.w_q[n * p.k + k];
      const float scaled = static_cast<float>(sum) * p.w_scale[p.w_scale.size() > 1 ? n : 0];
      const float own = x_scale[x_scale.size() > 1 ? m : 0];
      float v = p.y_bias.empty() ? scaled * own : std::fma(scaled, own, p.y_bias[n]);
      if (!p.residual.empty()) v += p.residual[m * p.n + n];
      if (p.relu && v < 0) v = 0;
      y.push_back(p.y_dtype == DType::kInt8 ? round_to_int8(v * inverse(p.out_scale[0])) : v);
    }
  }
  return y;
}

// --- the kernels ---------------------------------------------------------------------------------

template <typename T>
const T* given(const std::vector<T>& values) {
  return values.empty() ? nullptr : values.data();
}

sqk::QuantizeParams quantize_params(Problem& p) {
  sqk::QuantizeParams q = {};
  q.producer = p.producer;
  q.scheme = p.scheme;
  q.path = sqk::QuantizePath::kAuto;
  q.m = p.m;
  q.k = p.k;
  q.x = p.x.data();
  q.x_stride = p.k;
  if (sqk::is_norm(p.producer)) {
    q.residual = given(p.other);
    q.residual_stride = p.k;
    q.sum = p.sum.data();
    q.sum_stride = p.k;
  } else {
    q.gate = given(p.other);
    q.gate_stride = p.k;
  }
  q.weight = given(p.weight);
  q.bias = given(p.bias);
  q.eps = 1e-5;
  q.rotation = p.rotation;
  q.inv_smooth = given(p.inv_smooth);
  q.scale = given(p.scale);
  return q;
}

sqk::GemmParams gemm_params(const Problem& p, void* y) {
  sqk::GemmParams g = {};
  g.m = p.m;
  g.n = p.n;
  g.k = p.k;
  g.x_q = p.x_q.data();
  g.x_q_stride = p.k;
  g.w_q = p.w_q.data();
  g.w_q_stride = p.k;
  g.x_scale = p.x_scale.data();
  g.w_scale = p.w_scale.data();
  g.x_per_token = p.x_scale.size() > 1;
  g.w_per_channel = p.w_scale.size() > 1;
  g.bias = given(p.y_bias);
  g.residual = given(p.residual);
  g.residual_stride = p.n;
  g.y = y;
  g.y_stride = p.n;
  g.out_scale = given(p.out_scale);
  g.y_dtype = p.y_dtype;
  g.relu = p.relu;
  g.tile = -1;
  return g;
}

bool same(float a, float b) { return a == b || (std::isnan(a) && std::isnan(b)); }

int failures = 0;

template <typename T>
void compare(const char* what, const Problem& p, int level, int64_t threads,
             const std::vector<T>& found, const std::vector<float>& wanted) {
  for (size_t i = 0; i < wanted.size(); ++i) {
    if (same(static_cast<float>(found[i]), wanted[i])) continue;
    if (++failures <= 10) {
      std::printf(
          "%s at level %s, %d threads, M %d N %d K %d, %s, scheme %d, rotation %d: element "
          "%d is %g, not %g\n",
          what, sqk_cpu_level_name(level), static_cast<int>(threads), static_cast<int>(p.m),
          static_cast<int>(p.n), static_cast<int>(p.k),
          sqk::kProducerNames[static_cast<int>(p.producer)], static_cast<int>(p.scheme), p.rotation,
          static_cast<int>(i), static_cast<double>(found[i]), static_cast<double>(wanted[i]));
    }
    return;
  }
}

template <typename T>
void multiply(Problem& p, int level, const sqk::Threads& threads, const std::vector<float>& product,
              const std::vector<float>& layer) {
  const cudaStream_t stream = sqk::as_stream(&threads);
  std::vector<T> y(static_cast<size_t>(p.m * p.n));
  sqk::GemmParams gemm = gemm_params(p, y.data());
  sqk::GemmPlan plan;
  Status status = sqk::plan(gemm, &plan);
  std::vector<char> workspace(static_cast<size_t>(plan.workspace_bytes));
  gemm.workspace = workspace.data();
  gemm.workspace_bytes = plan.workspace_bytes;
  if (status == Status::kSuccess) status = sqk::gemm_s8(gemm, plan, stream);
  failures += status != Status::kSuccess;
  compare("gemm_s8", p, level, threads.count, y, product);

  std::fill(y.begin(), y.end(), T{});
  sqk::LinearParams linear = {quantize_params(p), gemm};
  sqk::LinearPlan linear_plan;
  status = sqk::plan(linear, &linear_plan);
  std::vector<char> own(static_cast<size_t>(linear_plan.workspace_bytes));
  linear.gemm.workspace = own.data();
  linear.gemm.workspace_bytes = linear_plan.workspace_bytes;
  if (status == Status::kSuccess) status = sqk::linear_s8(linear, linear_plan, stream);
  failures += status != Status::kSuccess;
  compare("linear_s8", p, level, threads.count, y, layer);
}

void check(Problem& p, int level, int64_t count) {
  const sqk::Threads threads = {count, run_in_threads};
  const Quantized wanted = quantized(p);
  Quantized found;
  found.x_q.resize(wanted.x_q.size());
  found.x_scale.resize(p.scheme == Scheme::kPerTensor ? 1 : wanted.x_scale.size());
  sqk::QuantizeParams q = quantize_params(p);
  q.x_q = found.x_q.data();
  q.x_q_stride = q.k_padded = p.k;
  q.x_scale = found.x_scale.data();
  sqk::QuantizePlan plan;
  Status status = sqk::plan(q, &plan);
  std::vector<char> workspace(static_cast<size_t>(plan.workspace_bytes));
  q.workspace = workspace.data();
  q.workspace_bytes = plan.workspace_bytes;
  if (status == Status::kSuccess) status = sqk::quantize(q, plan, sqk::as_stream(&threads));
  failures += status != Status::kSuccess;
  compare("x_q", p, level, count, found.x_q, {wanted.x_q.begin(), wanted.x_q.end()});
  std::vector<float> scales = wanted.x_scale;
  scales.resize(std::min(scales.size(), found.x_scale.size()));
  compare("x_scale", p, level, count, found.x_scale, scales);
  const std::vector<float> y = product(p, p.x_q, p.x_scale);
  const std::vector<float> layer = product(p, wanted.x_q, wanted.x_scale);
  if (p.y_dtype == DType::kInt8) {
    multiply<int8_t>(p, level, threads, y, layer);
  } else {
    multiply<float>(p, level, threads, y, layer);
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 3) return 2;
  random_bits.seed(static_cast<unsigned>(std::atoi(argv[1])));
  int problems = 0;
  for (int i = 0; i < std::atoi(argv[2]); ++i) {
    Problem p = make_problem();
    for (int level = 0; sqk_cpu_level_name(level) != nullptr; ++level) {
      const bool wanted = argc < 4 || std::string(argv[3]) == sqk_cpu_level_name(level);
      if (!wanted || !sqk_cpu_has_level(level)) continue;
      sqk_cpu_use_level(level);
      for (int64_t threads : {1, 3}) {
        check(p, level, threads);
        ++problems;
      }
    }
  }
  std::printf("%d runs, %d failures\n", problems, failures);
  return failures != 0 || problems == 0;
}
