// Random mixtures of experts, and the specification that their results are compared with. Included
// by cpu_kernels.cpp only, after cpu_problems.h.
#pragma once

#include "sqk/grouped.h"

namespace {

struct ExpertProblem {
  int64_t m, n, k, experts, x_rows;    // m: rows of y
  std::vector<int32_t> offsets, rows;  // rows: empty if row i reads row i
  std::vector<int8_t> x_q, w_q;
  std::vector<float> x_scale, w_scale, bias;
  int64_t tokens, choices;
  std::vector<int32_t> position;
  std::vector<float> weights, y;  // y: [m, n], whose rows are combined
};

ExpertProblem make_expert_problem() {
  ExpertProblem p = {};
  p.experts = pick({1, 2, 3, 8, 40});
  p.k = chance(4) ? 4096 + 70 : pick({1, 3, 15, 31, 63, 64, 65, 128, 200, 576});
  p.n = p.k < 100 && chance(20) ? 1100 : pick({1, 2, 5, 7, 16, 33, 48, 49, 130});
  // Only 16 groups of rows with so many channels are packed at the same time.
  const bool batches = p.experts == 40 && chance(15);
  if (batches) p.k = 65536 + 70, p.n = 1;
  // Before, of and after the experts.
  p.m = chance(50) ? 0 : pick({1, 5});
  p.offsets.push_back(static_cast<int32_t>(p.m));
  for (int64_t e = 0; e < p.experts; ++e) {
    p.m += chance(30) ? 0 : batches ? 1 : pick({1, 1, 2, 7, 16, 17});
    if (!batches && chance(4)) p.m += pick({40, 300});
    p.offsets.push_back(static_cast<int32_t>(p.m));
  }
  if (chance(50)) p.m += pick({1, 5, 40});
  p.x_rows = p.m;
  if (p.m > 0 && chance(70)) {
    p.x_rows = pick({1, 4, 60});
    p.rows = filled<int32_t>(
        p.m, [&] { return static_cast<int32_t>(random_bits() % static_cast<unsigned>(p.x_rows)); });
  }
  p.x_q = filled<int8_t>(p.x_rows * p.k, any_int8);
  p.w_q = filled<int8_t>(p.experts * p.n * p.k, any_int8);
  if (chance(20)) {
    std::fill(p.w_q.begin(), p.w_q.end(), static_cast<int8_t>(-128));
    std::fill(p.x_q.begin(), p.x_q.end(), static_cast<int8_t>(chance(50) ? 127 : -128));
  }
  p.x_scale = filled<float>(chance(70) ? std::max<int64_t>(p.m, 2) : 1, normal);
  if (chance(20)) p.x_scale[0] = chance(50) ? std::nanf("") : INFINITY;
  p.w_scale = filled<float>(p.experts * p.n, normal);
  if (chance(60)) p.bias = filled<float>(p.experts * p.n, [] { return 100 * normal(); });

  p.tokens = p.m == 0 ? 0 : pick({1, 2, 9, 40});
  p.choices = pick({1, 2, 8, 70});
  p.position = filled<int32_t>(p.tokens * p.choices, [&] {
    return static_cast<int32_t>(random_bits() % static_cast<unsigned>(p.m));
  });
  p.weights = filled<float>(p.tokens * p.choices, normal);
  p.y = filled<float>(p.m * p.n, [] { return chance(3) ? -0.0f : normal(); });
  if (!p.y.empty() && chance(20)) p.y[0] = chance(50) ? std::nanf("") : INFINITY;
  return p;
}

std::vector<float> grouped_expected(const ExpertProblem& p) {
  std::vector<float> y(static_cast<size_t>(p.m * p.n));
  for (int64_t e = 0; e < p.experts; ++e) {
    for (int64_t r = p.offsets[e]; r < p.offsets[e + 1]; ++r) {
      const int8_t* x = p.x_q.data() + (p.rows.empty() ? r : p.rows[r]) * p.k;
      for (int64_t n = 0; n < p.n; ++n) {
        const int8_t* w = p.w_q.data() + (e * p.n + n) * p.k;
        int64_t sum = 0;
        for (int64_t i = 0; i < p.k; ++i) sum += x[i] * w[i];
        const float scaled = static_cast<float>(sum) * p.w_scale[e * p.n + n];
        const float own = p.x_scale[p.x_scale.size() > 1 ? r : 0];
        y[r * p.n + n] = p.bias.empty() ? scaled * own : std::fma(scaled, own, p.bias[e * p.n + n]);
      }
    }
  }
  return y;
}

std::vector<float> combined_expected(const ExpertProblem& p) {
  std::vector<float> out;
  for (int64_t t = 0; t < p.tokens; ++t) {
    for (int64_t n = 0; n < p.n; ++n) {
      float sum = -0.0f;
      for (int64_t c = 0; c < p.choices; ++c) {
        const int64_t at = t * p.choices + c;
        sum = std::fma(p.weights[at], p.y[p.position[at] * p.n + n], sum);
      }
      out.push_back(sum);
    }
  }
  return out;
}

}  // namespace
