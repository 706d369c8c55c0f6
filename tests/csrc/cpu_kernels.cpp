// Runs the CPU kernels on random problems at every level of this processor and with several
// threads, and compares with the specification of cpu_problems.h. Built with sanitizers by
// test_cpu_kernels.py. Every buffer has its exact size, so that a sanitizer sees each access beyond
// it.
//   cpu_kernels SEED PROBLEMS [LEVEL]
#include <cstdio>
#include <cstdlib>
#include <string>
#include <thread>
#include <tuple>

#include "cpu/levels.h"
#include "cpu/threads.h"
// Needs the one before it.
// clang-format off
#include "cpu_problems.h"
#include "cpu_cache_problems.h"
#include "cpu_expert_problems.h"
// clang-format on

namespace {

// One thread for each task.
void run_in_threads(int64_t tasks, sqk::Task task, void* context) {
  std::vector<std::thread> running;
  for (int64_t i = 0; i < tasks; ++i) running.emplace_back(task, context, i);
  for (std::thread& thread : running) thread.join();
}

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

sqk::GemmParams gemm_params(const Problem& p) {
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

// Runs a kernel with a workspace of the size that its plan names. `owner` is the part of the
// parameters that has the workspace.
template <typename Params, typename Owner, typename Plan>
void run(Params& params, Owner& owner, Status (*launch)(const Params&, const Plan&, cudaStream_t),
         const sqk::Threads& threads) {
  Plan plan;
  Status status = sqk::plan(params, &plan);
  std::vector<char> workspace(static_cast<size_t>(plan.workspace_bytes));
  owner.workspace = workspace.data();
  owner.workspace_bytes = plan.workspace_bytes;
  if (status == Status::kSuccess) status = launch(params, plan, sqk::as_stream(&threads));
  failures += status != Status::kSuccess;
}

template <typename T>
void multiply(Problem& p, int level, const sqk::Threads& threads, const std::vector<float>& product,
              const std::vector<float>& layer) {
  std::vector<T> y(static_cast<size_t>(p.m * p.n));
  sqk::GemmParams gemm = gemm_params(p);
  gemm.y = y.data();
  run(gemm, gemm, sqk::gemm_s8, threads);
  compare("gemm_s8", p, level, threads.count, y, product);

  std::fill(y.begin(), y.end(), T{});
  sqk::LinearParams linear = {quantize_params(p), gemm};
  run(linear, linear.gemm, sqk::linear_s8, threads);
  compare("linear_s8", p, level, threads.count, y, layer);
  if (p.w_group.empty()) return;

  gemm.w_q = p.w_q4.data();
  gemm.w_q_stride = sqk::kW4Bytes * sqk::w4_groups(p.k);
  gemm.w_group = p.w_group.data();
  std::fill(y.begin(), y.end(), T{});
  run(gemm, gemm, sqk::gemm_s8, threads);
  compare("gemm_w4a8", p, level, threads.count, y, product);

  std::fill(y.begin(), y.end(), T{});
  linear = {quantize_params(p), gemm};
  run(linear, linear.gemm, sqk::linear_s8, threads);
  compare("linear_w4a8", p, level, threads.count, y, layer);
}

void multiply_gated(const Problem& p, int level, const sqk::Threads& threads) {
  const Gated wanted = gated(p);
  std::vector<int8_t> y(wanted.y.size());
  std::vector<float> y_scale(wanted.y_scale.size());
  sqk::GemmParams gemm = gemm_params(p);
  gemm.y = y.data();
  gemm.y_stride = p.n / 2;
  gemm.relu = 0;
  gemm.activation = p.activation;
  gemm.gate_dtype = p.gate_dtype;
  gemm.inv_smooth = given(p.gate_smooth);
  gemm.out_scale = p.gate_scale.data();
  gemm.y_scale = y_scale.data();
  run(gemm, gemm, sqk::gemm_s8, threads);
  compare("gemm_s8_gated", p, level, threads.count, y, wanted.y);
  compare("y_scale", p, level, threads.count, y_scale, wanted.y_scale);
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
  run(q, q, sqk::quantize, threads);
  compare("x_q", p, level, count, found.x_q, {wanted.x_q.begin(), wanted.x_q.end()});
  std::vector<float> scales = wanted.x_scale;
  scales.resize(std::min(scales.size(), found.x_scale.size()));
  compare("x_scale", p, level, count, found.x_scale, scales);
  const std::vector<float> y = product(p, p.x_q, p.x_scale);
  const std::vector<float> layer = product(p, wanted.x_q, wanted.x_scale);
  if (p.y_dtype == DType::kInt8) {
    multiply<int8_t>(p, level, threads, y, layer);
    if (p.activation != Producer::kQuantize) multiply_gated(p, level, threads);
  } else {
    multiply<float>(p, level, threads, y, layer);
  }
}

sqk::KvCache cache_of(CacheProblem& p) {
  sqk::KvCache cache = {};
  for (auto [half, data, scale] : {std::tuple{&cache.k, &p.k_cache, &p.k_scale},
                                   std::tuple{&cache.v, &p.v_cache, &p.v_scale}}) {
    half->data = data->data();
    half->head_stride = p.size * p.width();
    half->block_stride = p.heads * half->head_stride;
    half->scale = scale->empty() ? nullptr : scale->data();
    half->scale_head_stride = p.size;
    half->scale_block_stride = p.heads * p.size;
    half->dim = p.dim;
  }
  cache.blocks = p.blocks;
  cache.heads = p.heads;
  cache.block_size = p.size;
  cache.table = given(p.table);
  cache.table_stride = p.entries;
  cache.ring = p.ring;
  return cache;
}

void report(const char* what, const CacheProblem& p, int level, int64_t threads, int64_t element) {
  if (++failures > 10) return;
  std::printf("%s at level %s, %d threads, D %d, tokens %d, size %d, rotation %d: element %d\n",
              what, sqk_cpu_level_name(level), static_cast<int>(threads), static_cast<int>(p.dim),
              static_cast<int>(p.tokens), static_cast<int>(p.size), p.rotation,
              static_cast<int>(element));
}

template <typename T>
void compare_cache(const char* what, const CacheProblem& p, int level, int64_t threads,
                   const std::vector<T>& found, const std::vector<T>& wanted) {
  for (size_t i = 0; i < wanted.size(); ++i) {
    if (same(found[i], wanted[i])) continue;
    return report(what, p, level, threads, static_cast<int64_t>(i));
  }
}

// Writes new tokens, and then attends to the cache that `wanted` holds as well.
void check_cache(const CacheProblem& given_problem, int level, int64_t count) {
  const sqk::Threads threads = {count, run_in_threads};
  CacheProblem p = given_problem, wanted = given_problem;
  sqk::KvAppendParams a = {};
  a.dtype = a.rope_dtype = DType::kFloat32;
  a.batch = p.batch;
  a.tokens = p.tokens;
  a.k = {p.k.data(), p.heads * p.tokens * p.dim, p.tokens * p.dim, p.dim, given(p.k_inverse)};
  a.v = {p.v.data(), p.heads * p.tokens * p.dim, p.tokens * p.dim, p.dim, given(p.v_inverse)};
  a.cache = cache_of(p);
  a.positions = p.positions.data();
  a.cos = given(p.cos);
  a.sin = given(p.sin);
  a.rope_dim = p.rope;
  a.cos_token_stride = a.sin_token_stride = p.rope;
  a.rotation = p.rotation;
  failures += sqk::kv_append(a, sqk::as_stream(&threads)) != Status::kSuccess;
  append_expected(wanted);
  compare_cache("kv_append", p, level, count, p.k_cache, wanted.k_cache);
  compare_cache("kv_append", p, level, count, p.v_cache, wanted.v_cache);
  compare_cache("kv_append", p, level, count, p.k_scale, wanted.k_scale);
  compare_cache("kv_append", p, level, count, p.v_scale, wanted.v_scale);

  const Output expected = attention_expected(wanted);
  std::vector<float> y(p.q.size());
  sqk::AttentionParams d = {};
  d.dtype = DType::kFloat32;
  d.batch = p.batch;
  d.heads = p.heads * p.group;
  d.tokens = p.tokens;
  d.q = p.q.data();
  d.q_batch_stride = d.heads * p.tokens * p.dim;
  d.q_head_stride = p.tokens * p.dim;
  d.q_token_stride = p.dim;
  d.y = y.data();
  d.cache = cache_of(wanted);
  d.lengths = p.lengths.data();
  d.scale = p.score_scale;
  d.k_smooth = given(p.k_factor);
  d.v_smooth = given(p.v_factor);
  d.rotation = p.rotation;
  d.window = p.window;
  d.mask = given(p.mask);
  d.mask_token_stride = p.positions_of();
  d.mask_batch_stride = p.tokens * p.positions_of();
  d.mask_column_stride = 1;
  run(d, d, sqk::decode_attention_s8, threads);
  for (size_t i = 0; i < y.size(); ++i) {
    const double far = std::fabs(y[i] - expected.y[i]);
    if (far <= expected.bound[i] || (std::isnan(y[i]) && std::isnan(expected.y[i]))) continue;
    return report("decode_attention_s8", p, level, count, static_cast<int64_t>(i));
  }
}

void compare_experts(const char* what, const ExpertProblem& p, int level, int64_t threads,
                     const std::vector<float>& found, const std::vector<float>& wanted) {
  for (size_t i = 0; i < wanted.size(); ++i) {
    if (same(found[i], wanted[i]) && std::signbit(found[i]) == std::signbit(wanted[i])) continue;
    if (std::isnan(found[i]) && std::isnan(wanted[i])) continue;
    if (++failures > 10) return;
    std::printf(
        "%s at level %s, %d threads, M %d N %d K %d, %d experts: element %d is %g, not %g\n", what,
        sqk_cpu_level_name(level), static_cast<int>(threads), static_cast<int>(p.m),
        static_cast<int>(p.n), static_cast<int>(p.k), static_cast<int>(p.experts),
        static_cast<int>(i), static_cast<double>(found[i]), static_cast<double>(wanted[i]));
    return;
  }
}

// What a caller may pass by mistake: undefined results, but nothing beyond the arrays is touched.
std::vector<int32_t> spoiled(std::vector<int32_t> values) {
  for (int32_t& value : values) {
    if (chance(30)) value = static_cast<int32_t>(chance(50) ? random_bits() : random_bits() % 50);
  }
  return values;
}

void check_experts(const ExpertProblem& p, int level, int64_t count) {
  const sqk::Threads threads = {count, run_in_threads};
  std::vector<float> y(static_cast<size_t>(p.m * p.n), 7.0f);
  sqk::GroupedParams g = {};
  g.m = p.m;
  g.n = p.n;
  g.k = p.k;
  g.experts = p.experts;
  g.x_q = p.x_q.data();
  g.x_rows = p.x_rows;
  g.x_q_stride = p.k;
  g.rows = given(p.rows);
  g.offsets = p.offsets.data();
  g.w_q = p.w_q.data();
  g.w_q_stride = p.k;
  g.w_q_expert_stride = p.n * p.k;
  g.x_scale = p.x_scale.data();
  g.x_per_token = p.x_scale.size() > 1;
  g.w_scale = p.w_scale.data();
  g.bias = given(p.bias);
  g.y = y.data();
  g.y_stride = p.n;
  g.y_dtype = DType::kFloat32;
  g.tile = -1;
  run(g, g, sqk::grouped_gemm_s8, threads);
  compare_experts("grouped_gemm_s8", p, level, count, y, grouped_expected(p));

  std::vector<float> out(static_cast<size_t>(p.tokens * p.n));
  sqk::CombineParams c = {};
  c.tokens = p.tokens;
  c.choices = p.choices;
  c.n = c.y_stride = c.out_stride = p.n;
  c.y_rows = p.m;
  c.y = p.y.data();
  c.position = p.position.data();
  c.weights = p.weights.data();
  c.out = out.data();
  c.dtype = c.weights_dtype = DType::kFloat32;
  failures += sqk::combine_experts(c, sqk::as_stream(&threads)) != Status::kSuccess;
  compare_experts("combine_experts", p, level, count, out, combined_expected(p));

  const std::vector<int32_t> offsets = spoiled(p.offsets), rows = spoiled(p.rows),
                             position = spoiled(p.position);
  g.offsets = offsets.data();
  g.rows = given(rows);
  c.position = position.data();
  run(g, g, sqk::grouped_gemm_s8, threads);
  failures += sqk::combine_experts(c, sqk::as_stream(&threads)) != Status::kSuccess;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 3) return 2;
  random_bits.seed(static_cast<unsigned>(std::atoi(argv[1])));
  int problems = 0;
  for (int i = 0; i < std::atoi(argv[2]); ++i) {
    Problem p = make_problem();
    const CacheProblem c = make_cache_problem();
    const ExpertProblem e = make_expert_problem();
    for (int level = 0; sqk_cpu_level_name(level) != nullptr; ++level) {
      const bool wanted = argc < 4 || std::string(argv[3]) == sqk_cpu_level_name(level);
      if (!wanted || !sqk_cpu_has_level(level)) continue;
      sqk_cpu_use_level(level);
      for (int64_t threads : {1, 3}) {
        check(p, level, threads);
        check_cache(c, level, threads);
        check_experts(e, level, threads);
        ++problems;
      }
    }
  }
  std::printf("%d runs, %d failures\n", problems, failures);
  return failures != 0 || problems == 0;
}
