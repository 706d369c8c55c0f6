// Binding of csrc/gemm: the int8 GEMMs and the whole linear layer. Schemas, fakes and CPU kernels
// are in smoothquant_kernels/ops/.
#include "sqk/gemm.h"

#include <string>

#include "arguments.h"

namespace sqk {
namespace {

// Of a row whose next one is to be aligned.
int64_t padded(int64_t k) { return (k + kGemmAlignment - 1) / kGemmAlignment * kGemmAlignment; }

void check_int8(const char* op, const char* name, const Tensor& tensor) {
  SQK_CHECK(tensor.scalar_type() == ScalarType::Char, op, ": ", name, " must be int8, got ",
            dtype_name(tensor.scalar_type()), ". Quantize it first (ops.quantize).");
}

// A scale: one for each, or one for all.
void check_scale(const char* op, const char* name, const Tensor& scale, const Tensor& like,
                 int64_t size, const char* what) {
  if (scale.dim() == 1 && scale.size(0) == 1) return check_vector(op, name, scale, like, 1, what);
  SQK_CHECK(scale.scalar_type() == ScalarType::Float, op, ": ", name, " must be float32, got ",
            dtype_name(scale.scalar_type()), ". Scales and smoothing factors stay in float32.");
  check_device(op, name, scale, like);
  SQK_CHECK(scale.dim() == 1 && scale.size(0) == size, op, ": ", name, " must have shape [", size,
            size == 1 ? "" : "] or [1", "] (", what, "), got ", tuple_text(scale), ".");
}

void check_weight(const char* op, const Tensor& x, const Tensor& w_q) {
  check_int8(op, "w_q", w_q);
  check_device(op, "w_q", w_q, x);
  SQK_CHECK(
      x.dim() >= 1 && w_q.dim() == 2 && w_q.size(0) >= 1 && x.size(x.dim() - 1) == w_q.size(1), op,
      ": x_q must be [..., K] and w_q [N, K] with the same K and N >= 1, got ", tuple_text(x),
      " and ", tuple_text(w_q), ".");
  const int64_t k = w_q.size(1);
  SQK_CHECK(k >= 1 && k <= kMaxGemmK, op, ": K must be in [1, ", kMaxGemmK,
            "] so that an int32 sum cannot overflow, got ", k, "; split the layer over K.");
}

// What every op here has besides its activation. Tensors are kept as long as the call.
class Gemm {
 public:
  Gemm(const char* op, const Tensor& x, const Tensor& w_q, const Tensor& w_scale,
       const MaybeTensor& bias, ScalarType y_dtype)
      : op_(op), x_(x) {
    check_weight(op, x, w_q);
    params_.m = Rows::count(x);
    params_.n = w_q.size(0);
    params_.k = w_q.size(1);
    check_scale(op, "w_scale", w_scale, x, params_.n, "per output channel or per tensor");
    if (bias) {
      check_float(op, "bias", *bias);
      check_device(op, "bias", *bias, x);
      SQK_CHECK(bias->dim() == 1 && bias->size(0) == params_.n, op, ": bias must have shape [",
                params_.n, "], got ", tuple_text(*bias), ".");
    }
    params_.y_dtype = to_dtype(y_dtype);
    params_.tile = -1;
    y_dtype_ = y_dtype;
    w_q_ = w_q;
    w_scale_ = w_scale;
    bias_ = bias;
  }

  GemmParams& params() { return params_; }

  // What may copy: only now all arguments are known to be sound, and the device is the current one.
  void prepare() {
    params_.w_q = aligned_rows(*w_q_, params_.w_q_stride, w_rows_);
    w_scale_ = dense(*w_scale_);
    params_.w_scale = floats(*w_scale_);
    params_.w_per_channel = w_scale_->size(0) > 1;
    if (bias_) {
      bias_ = as_float32(*bias_);
      params_.bias = floats(*bias_);
    }
  }

  void set_activation(const Tensor& x_q, const Tensor& x_scale) {
    params_.x_q = aligned_rows(x_q, params_.x_q_stride, x_rows_);
    x_scale_ = dense(x_scale);
    params_.x_scale = floats(*x_scale_);
    params_.x_per_token = x_scale_->size(0) > 1;
  }

  void set_residual(const MaybeTensor& residual) {
    if (!residual) return;
    const Rows& rows = residual_.emplace(*residual);
    params_.residual = rows.data;
    params_.residual_stride = rows.stride;
    params_.residual_dtype = to_dtype(residual->scalar_type());
  }

  Tensor make_y() {
    Tensor y = new_rows(x_, params_.n, y_dtype_);
    params_.y = y.mutable_data_ptr();
    params_.y_stride = params_.n;
    return y;
  }

  Tensor run(const Launch& launch) {
    Tensor y = make_y();
    GemmPlan plan;
    Status status = sqk::plan(params_, &plan);
    if (status == Status::kSuccess) {
      MaybeTensor workspace;
      params_.workspace_bytes = plan.workspace_bytes;
      params_.workspace = make_workspace(x_, plan.workspace_bytes, workspace);
      status = gemm_s8(params_, plan, launch.stream());
    }
    check(status);
    return y;
  }

  void check(Status status) const {
    SQK_CHECK(
        status == Status::kSuccess, op_, ": ", describe(status), "; M ", params_.m, ", N ",
        params_.n, ", K ", params_.k,
        params_.tile >= 0 ? concat(", tile ", params_.tile, ", splits ", params_.splits) : "");
  }

 private:
  // Rows as the kernels load them, 16 bytes at a time: the tensor itself where it lies so (what the
  // quantizers return with k_multiple = 16 does, and a packed weight), else a padded copy.
  const int8_t* aligned_rows(const Tensor& t, int64_t& stride, std::optional<Rows>& keep) {
    if (Rows::uniform(t)) {
      const Rows& rows = keep.emplace(t);
      const int64_t count = Rows::count(t);
      if (reinterpret_cast<uintptr_t>(rows.data) % kGemmAlignment == 0 &&
          (count <= 1 || (rows.stride % kGemmAlignment == 0 && rows.stride >= params_.k))) {
        stride = rows.stride;
        return static_cast<const int8_t*>(rows.data);
      }
    }
    const int64_t last = t.dim() - 1;
    stride = padded(params_.k);
    Tensor copy = new_rows(t, stride, ScalarType::Char);
    Tensor columns = torch::stable::narrow(copy, last, 0, params_.k);
    torch::stable::copy_(columns, t);
    return static_cast<const int8_t*>(keep.emplace(copy).data);
  }

  static Tensor as_float32(const Tensor& t) {
    if (t.scalar_type() == ScalarType::Float) return dense(t);
    Tensor copy = new_vector(t, t.size(0), ScalarType::Float);
    return torch::stable::copy_(copy, t);
  }

  const char* op_;
  const Tensor& x_;
  GemmParams params_ = {};
  ScalarType y_dtype_;
  MaybeTensor w_q_, w_scale_, x_scale_, bias_;
  std::optional<Rows> x_rows_, w_rows_, residual_;
};

void check_activation(const char* op, const Tensor& x_q, const Tensor& x_scale) {
  check_int8(op, "x_q", x_q);
  check_scale(op, "x_scale", x_scale, x_q, Rows::count(x_q), "per token or per tensor");
}

Tensor gemm(const char* op, const Tensor& x_q, const Tensor& w_q, const Tensor& x_scale,
            const Tensor& w_scale, const MaybeTensor& bias, const MaybeTensor& residual,
            ScalarType out_dtype, int64_t tile, int64_t splits) {
  check_int8(op, "x_q", x_q);
  Gemm gemm(op, x_q, w_q, w_scale, bias, out_dtype);
  check_activation(op, x_q, x_scale);
  SQK_CHECK(is_float(out_dtype), op, ": out_dtype must be float16, bfloat16 or float32, got ",
            dtype_name(out_dtype), ".");
  if (residual) {
    check_float(op, "residual", *residual);
    check_device(op, "residual", *residual, x_q);
    bool fits = residual->dim() == x_q.dim() && residual->size(x_q.dim() - 1) == w_q.size(0);
    for (int64_t i = 0; fits && i + 1 < x_q.dim(); ++i) fits = residual->size(i) == x_q.size(i);
    SQK_CHECK(fits, op, ": residual must have shape ", output_shape_text(x_q, w_q.size(0)),
              ", got ", tuple_text(*residual), ".");
  }
  constexpr int64_t kMostInt = 1 << 30;
  SQK_CHECK(tile >= -1 && tile < kMostInt && splits >= 0 && splits < kMostInt, op,
            ": tile must be -1 or a row of the table, splits at least 0, got ", tile, " and ",
            splits, ".");
  const Launch launch(x_q);
  gemm.prepare();
  gemm.set_activation(x_q, x_scale);
  gemm.set_residual(residual);
  gemm.params().tile = static_cast<int32_t>(tile);
  gemm.params().splits = static_cast<int32_t>(splits);
  return gemm.run(launch);
}

Tensor gemm_s8_op(const Tensor& x_q, const Tensor& w_q, const Tensor& x_scale,
                  const Tensor& w_scale, const MaybeTensor& bias, const MaybeTensor& residual,
                  ScalarType out_dtype) {
  return gemm("gemm_s8", x_q, w_q, x_scale, w_scale, bias, residual, out_dtype, -1, 0);
}

Tensor gemm_s8_tile_op(const Tensor& x_q, const Tensor& w_q, const Tensor& x_scale,
                       const Tensor& w_scale, const MaybeTensor& bias, const MaybeTensor& residual,
                       ScalarType out_dtype, int64_t tile, int64_t splits) {
  return gemm("_gemm_s8_tile", x_q, w_q, x_scale, w_scale, bias, residual, out_dtype, tile, splits);
}

Tensor gemm_s8_requant_op(const Tensor& x_q, const Tensor& w_q, const Tensor& x_scale,
                          const Tensor& w_scale, const Tensor& out_scale, const MaybeTensor& bias,
                          bool relu) {
  const char* const op = "gemm_s8_requant";
  check_int8(op, "x_q", x_q);
  Gemm gemm(op, x_q, w_q, w_scale, bias, ScalarType::Char);
  check_activation(op, x_q, x_scale);
  check_vector(op, "out_scale", out_scale, x_q, 1, "the scale of the int8 output");
  const Launch launch(x_q);
  gemm.prepare();
  gemm.set_activation(x_q, x_scale);
  gemm.params().out_scale = floats(out_scale);
  gemm.params().relu = relu;
  return gemm.run(launch);
}

// Bytes, so that what lies behind them is aligned as a workspace must be.
int64_t whole_blocks(int64_t bytes) { return (bytes + 255) / 256 * 256; }

Tensor linear_s8_op(const Tensor& x, const Tensor& w_q, const Tensor& w_scale,
                    const MaybeTensor& bias, const MaybeTensor& inv_smooth,
                    const MaybeTensor& scale, StringHandle granularity_handle) {
  const char* const op = "linear_s8";
  const Text granularity(granularity_handle);
  check_activation_input(op, x);
  Gemm gemm(op, x, w_q, w_scale, bias, x.scalar_type());
  LinearParams params = {};
  QuantizeParams& quantizer = params.quantize;
  quantizer.producer = Producer::kQuantize;
  check_quantizer(op, x, gemm.params().k, inv_smooth, scale, granularity.view(), quantizer);
  const Launch launch(x);
  gemm.prepare();
  const Rows rows(x);
  quantizer.x = rows.data;
  quantizer.x_stride = rows.stride;
  const MaybeTensor factors = dense(inv_smooth);
  if (factors) quantizer.inv_smooth = floats(*factors);
  if (scale) quantizer.scale = floats(*scale);
  quantizer.k_padded = padded(quantizer.k);
  quantizer.x_q_stride = quantizer.k_padded;
  Tensor y = gemm.make_y();
  params.gemm = gemm.params();
  params.gemm.x_q_stride = quantizer.k_padded;
  LinearPlan plan;
  Status status = sqk::plan(params, &plan);
  if (status == Status::kSuccess) {
    // One allocation for all that lives as long as the call: x_q, x_scale, workspace.
    int64_t x_q_bytes = 0, x_scale_bytes = 0;
    if (!plan.fused) {
      const int64_t scales = quantizer.scheme == Scheme::kPerTensor ? 1 : quantizer.m;
      x_q_bytes = whole_blocks(quantizer.m * quantizer.k_padded);
      x_scale_bytes = whole_blocks(scales * int64_t{sizeof(float)});
    }
    MaybeTensor keep;
    auto* const memory = static_cast<int8_t*>(
        make_workspace(x, x_q_bytes + x_scale_bytes + plan.workspace_bytes, keep));
    if (!plan.fused) {
      quantizer.x_q = memory;
      quantizer.x_scale = reinterpret_cast<float*>(memory + x_q_bytes);
    }
    params.gemm.workspace_bytes = plan.workspace_bytes;
    if (plan.workspace_bytes > 0) params.gemm.workspace = memory + x_q_bytes + x_scale_bytes;
    status = linear_s8(params, plan, launch.stream());
  }
  gemm.check(status);
  return y;
}

}  // namespace
}  // namespace sqk

STABLE_TORCH_LIBRARY_IMPL(smoothquant_kernels, SQK_DISPATCH_KEY, m) {
  m.impl("gemm_s8", TORCH_BOX(&sqk::gemm_s8_op));
  m.impl("gemm_s8_requant", TORCH_BOX(&sqk::gemm_s8_requant_op));
  m.impl("linear_s8", TORCH_BOX(&sqk::linear_s8_op));
  m.impl("_gemm_s8_tile", TORCH_BOX(&sqk::gemm_s8_tile_op));
}
