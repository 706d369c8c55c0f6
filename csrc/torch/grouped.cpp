// Binding of csrc/gemm/grouped: experts. Schemas, fakes and CPU kernels are in
// smoothquant_kernels/ops/.
#include "sqk/grouped.h"

#include "arguments.h"
#include "gemm_call.h"

namespace sqk {
namespace {

constexpr const char* kGrouped = "grouped_gemm_s8";
constexpr const char* kCombine = "combine_experts";

// int32 with these sizes.
void check_indices(const char* op, const char* name, const Tensor& tensor, const Tensor& like,
                   std::initializer_list<int64_t> sizes, const char* what) {
  SQK_CHECK(tensor.scalar_type() == ScalarType::Int, op, ": ", name, " must be int32, got ",
            dtype_name(tensor.scalar_type()), ".");
  check_device(op, name, tensor, like);
  bool fits = tensor.dim() == static_cast<int64_t>(sizes.size());
  int64_t i = 0;
  for (int64_t size : sizes) fits = fits && tensor.size(i++) == size;
  std::string text;
  for (int64_t size : sizes) text += (text.empty() ? "" : ", ") + std::to_string(size);
  SQK_CHECK(fits, op, ": ", name, " must have shape (", text, sizes.size() == 1 ? "," : "", ") (",
            what, "), got ", tuple_text(tensor), ".");
}

const int32_t* ints(const Tensor& tensor) {
  return static_cast<const int32_t*>(tensor.const_data_ptr());
}

// A matrix [experts, n] of floats as dense float32.
Tensor as_floats(const Tensor& t) {
  if (t.scalar_type() == ScalarType::Float) return dense(t);
  Tensor copy = new_rows(t, t.size(t.dim() - 1), ScalarType::Float);
  return torch::stable::copy_(copy, t);
}

// int8 rows that the kernels can load: the tensor itself, or a padded copy.
Tensor loadable(const Tensor& t) {
  const int64_t last = t.dim() - 1, width = t.size(last);
  const int64_t stride = t.stride(last - 1);
  bool fits = (width <= 1 || t.stride(last) == 1) && stride >= width &&
              is_aligned(t.const_data_ptr(), kRowAlignment);
  for (int64_t i = 0; i < last; ++i) fits = fits && t.stride(i) % kRowAlignment == 0;
  if (last == 2) fits = fits && (t.size(0) <= 1 || t.stride(0) >= stride * t.size(1));
  if (fits) return t;
  Tensor copy = new_rows(t, padded(width), t.scalar_type());
  Tensor columns = torch::stable::narrow(copy, last, 0, width);
  torch::stable::copy_(columns, t);
  return columns;
}

#ifdef SQK_CPU
// A CPU can look at the values.
void check_values(const GroupedParams& p) {
  int32_t before = 0;
  for (int64_t e = 0; e <= p.experts; ++e) {
    SQK_CHECK(p.offsets[e] >= before && p.offsets[e] <= p.m, kGrouped,
              ": offsets must ascend from 0 or more to at most ", p.m, ", got ", p.offsets[e],
              " after ", before, ".");
    before = p.offsets[e];
  }
  for (int64_t i = 0; p.rows != nullptr && i < p.m; ++i) {
    SQK_CHECK(p.rows[i] >= 0 && p.rows[i] < p.x_rows, kGrouped, ": rows must be in [0, ", p.x_rows,
              "), got ", p.rows[i], ".");
  }
}
#endif

Tensor grouped_gemm_s8_op(const Tensor& x_q, const Tensor& w_q, const Tensor& x_scale,
                          const Tensor& w_scale, const Tensor& offsets, const MaybeTensor& rows,
                          const MaybeTensor& bias, ScalarType out_dtype) {
  check_int8(kGrouped, "x_q", x_q);
  check_int8(kGrouped, "w_q", w_q);
  check_device(kGrouped, "w_q", w_q, x_q);
  SQK_CHECK(x_q.dim() == 2 && w_q.dim() == 3 && w_q.size(0) >= 1 && w_q.size(1) >= 1 &&
                x_q.size(1) == w_q.size(2),
            kGrouped,
            ": x_q must be [R, K] and w_q [E, N, K] with the same K, E >= 1 and N >= 1, got ",
            tuple_text(x_q), " and ", tuple_text(w_q), ".");
  GroupedParams p = {};
  p.experts = w_q.size(0);
  p.n = w_q.size(1);
  p.k = w_q.size(2);
  SQK_CHECK(p.k >= 1 && p.k <= kMaxGemmK, kGrouped, ": K must be in [1, ", kMaxGemmK,
            "] so that an int32 sum cannot overflow, got ", p.k, "; split the layer over K.");
  SQK_CHECK(p.experts <= kMaxExperts, kGrouped, ": at most ", kMaxExperts, " experts, got ",
            p.experts, ".");
  p.x_rows = x_q.size(0);
  p.m = rows && rows->dim() == 1 ? rows->size(0) : p.x_rows;
  if (rows) check_indices(kGrouped, "rows", *rows, x_q, {p.m}, "the row of x_q for each result");
  SQK_CHECK(p.m == 0 || p.x_rows > 0, kGrouped, ": x_q has no rows, but rows has ", p.m, ".");
  check_indices(kGrouped, "offsets", offsets, x_q, {p.experts + 1}, "one more than experts");
  check_scale(kGrouped, "x_scale", x_scale, x_q, p.m, "per result or for all");
  SQK_CHECK(w_scale.scalar_type() == ScalarType::Float, kGrouped, ": w_scale must be float32, got ",
            dtype_name(w_scale.scalar_type()), ". Scales and smoothing factors stay in float32.");
  check_device(kGrouped, "w_scale", w_scale, x_q);
  SQK_CHECK(w_scale.dim() == 2 && w_scale.size(0) == p.experts && w_scale.size(1) == p.n, kGrouped,
            ": w_scale must have shape (", p.experts, ", ", p.n, "), got ", tuple_text(w_scale),
            ".");
  if (bias) {
    check_float(kGrouped, "bias", *bias);
    check_device(kGrouped, "bias", *bias, x_q);
    SQK_CHECK(bias->dim() == 2 && bias->size(0) == p.experts && bias->size(1) == p.n, kGrouped,
              ": bias must have shape (", p.experts, ", ", p.n, "), got ", tuple_text(*bias), ".");
  }
  SQK_CHECK(is_float(out_dtype), kGrouped, ": out_dtype must be float16, bfloat16 or float32, got ",
            dtype_name(out_dtype), ".");
  const Launch launch(x_q);
  const Tensor x_kept = loadable(x_q), w_kept = loadable(w_q), offsets_kept = dense(offsets);
  const Tensor x_scale_kept = dense(x_scale), w_scale_kept = dense(w_scale);
  const MaybeTensor rows_kept = dense(rows);
  const MaybeTensor bias_kept = bias ? MaybeTensor(as_floats(*bias)) : std::nullopt;
  p.x_q = static_cast<const int8_t*>(x_kept.const_data_ptr());
  p.x_q_stride = x_kept.stride(0);
  p.rows = rows ? ints(*rows_kept) : nullptr;
  p.offsets = ints(offsets_kept);
  p.w_q = static_cast<const int8_t*>(w_kept.const_data_ptr());
  p.w_q_expert_stride = w_kept.stride(0);
  p.w_q_stride = w_kept.stride(1);
  p.x_scale = floats(x_scale_kept);
  p.x_per_token = x_scale.size(0) > 1;
  p.w_scale = floats(w_scale_kept);
  p.bias = bias ? floats(*bias_kept) : nullptr;
  p.y_dtype = to_dtype(out_dtype);
  p.y_stride = p.n;
  p.tile = -1;
#ifdef SQK_CPU
  check_values(p);
#endif
  const int64_t sizes[] = {p.m, p.n};
  Tensor y = empty_on(x_q, sizes, 2, out_dtype);
  p.y = y.mutable_data_ptr();
  GroupedPlan plan;
  Status status = sqk::plan(p, &plan);
  if (status == Status::kSuccess) {
    MaybeTensor workspace;
    p.workspace_bytes = plan.workspace_bytes;
    p.workspace = make_workspace(x_q, plan.workspace_bytes, workspace);
    status = grouped_gemm_s8(p, plan, launch.stream());
  }
  SQK_CHECK(status == Status::kSuccess, kGrouped, ": ", describe(status), "; rows ", p.m,
            ", experts ", p.experts, ", N ", p.n, ", K ", p.k);
  return y;
}

Tensor combine_experts_op(const Tensor& y, const Tensor& position, const Tensor& weights) {
  check_float(kCombine, "y", y);
  SQK_CHECK(y.dim() == 2 && y.size(1) >= 1, kCombine,
            ": y must have shape [S, N] with N >= 1, got ", tuple_text(y), ".");
  SQK_CHECK(weights.dim() == 2 && weights.size(1) >= 1, kCombine,
            ": weights must have shape [T, choices] with at least one choice, got ",
            tuple_text(weights), ".");
  check_float(kCombine, "weights", weights);
  check_device(kCombine, "weights", weights, y);
  CombineParams p = {};
  p.tokens = weights.size(0);
  p.choices = weights.size(1);
  check_indices(kCombine, "position", position, y, {p.tokens, p.choices}, "the shape of weights");
  p.n = y.size(1);
  p.y_rows = y.size(0);
  SQK_CHECK(p.tokens == 0 || p.y_rows > 0, kCombine, ": y has no rows, but position has ", p.tokens,
            ".");
  const Launch launch(y);
  const bool adjacent = y.stride(1) == 1 || p.n == 1;
  const Tensor y_kept = adjacent ? y : dense(y);
  const Tensor position_kept = dense(position), weights_kept = dense(weights);
  p.y = y_kept.const_data_ptr();
  p.y_stride = y_kept.stride(0);
  p.position = ints(position_kept);
  p.weights = weights_kept.const_data_ptr();
  p.dtype = to_dtype(y.scalar_type());
  p.weights_dtype = to_dtype(weights.scalar_type());
#ifdef SQK_CPU
  for (int64_t i = 0; i < p.tokens * p.choices; ++i) {
    SQK_CHECK(p.position[i] >= 0 && p.position[i] < p.y_rows, kCombine,
              ": position must be in [0, ", p.y_rows, "), got ", p.position[i], ".");
  }
#endif
  const int64_t sizes[] = {p.tokens, p.n};
  Tensor out = empty_on(y, sizes, 2, y.scalar_type());
  p.out = out.mutable_data_ptr();
  p.out_stride = p.n;
  const Status status = combine_experts(p, launch.stream());
  SQK_CHECK(status == Status::kSuccess, kCombine, ": ", describe(status), "; tokens ", p.tokens,
            ", choices ", p.choices, ", N ", p.n);
  return out;
}

}  // namespace
}  // namespace sqk

STABLE_TORCH_LIBRARY_IMPL(smoothquant_kernels, SQK_DISPATCH_KEY, m) {
  m.impl("grouped_gemm_s8", TORCH_BOX(&sqk::grouped_gemm_s8_op));
  m.impl("combine_experts", TORCH_BOX(&sqk::combine_experts_op));
}
