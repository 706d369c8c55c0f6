// Checks of arguments that several ops share, in the words of smoothquant_kernels/_checks.py.
#pragma once

#include <algorithm>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "check.h"
#include "sqk/quantize.h"
#include "stable.h"

namespace sqk {

using MaybeTensor = std::optional<Tensor>;

inline bool is_float(ScalarType dtype) {
  return dtype == ScalarType::Half || dtype == ScalarType::BFloat16 || dtype == ScalarType::Float;
}

inline DType to_dtype(ScalarType dtype) {
  if (dtype == ScalarType::Half) return DType::kFloat16;
  return dtype == ScalarType::BFloat16 ? DType::kBFloat16 : DType::kFloat32;
}

// "(4, 8)", "(4,)", "()": as Python writes a tuple.
inline std::string tuple_text(const Tensor& tensor) {
  std::string text = "(";
  for (int64_t i = 0; i < tensor.dim(); ++i) {
    text += (i ? ", " : "") + std::to_string(tensor.size(i));
  }
  return text + (tensor.dim() == 1 ? ",)" : ")");
}

// The same for [..., n] with the leading dimensions of x.
inline std::string output_shape_text(const Tensor& x, int64_t n) {
  std::string text = "(";
  for (int64_t i = 0; i + 1 < x.dim(); ++i) text += std::to_string(x.size(i)) + ", ";
  return text + std::to_string(n) + (x.dim() == 1 ? ",)" : ")");
}

inline bool same_shape(const Tensor& a, const Tensor& b) {
  const auto left = a.sizes(), right = b.sizes();
  return std::equal(left.begin(), left.end(), right.begin(), right.end());
}

inline void check_float(const std::string& op, const char* name, const Tensor& tensor) {
  SQK_CHECK(is_float(tensor.scalar_type()), op, ": ", name,
            " must be float16 or bfloat16 or float32, got ", dtype_name(tensor.scalar_type()), ".");
}

inline void check_device(const std::string& op, const char* name, const Tensor& tensor,
                         const Tensor& like) {
  SQK_CHECK(tensor.device() == like.device(), op, ": ", name,
            " is on another device than the activation; move them to one device.");
}

// A float32 vector of `size` elements, or nothing.
inline void check_vector(const std::string& op, const char* name, const MaybeTensor& tensor,
                         const Tensor& like, int64_t size, const char* what) {
  if (!tensor) return;
  SQK_CHECK(tensor->scalar_type() == ScalarType::Float, op, ": ", name, " must be float32, got ",
            dtype_name(tensor->scalar_type()), ". Scales and smoothing factors stay in float32.");
  check_device(op, name, *tensor, like);
  SQK_CHECK(tensor->dim() == 1 && tensor->size(0) == size, op, ": ", name, " must have shape [",
            size, "] (", what, "), got ", tuple_text(*tensor), ".");
}

// Scratch memory from torch's allocator, whose blocks start at multiples of 256 bytes at least; null
// for none. `keep` owns it.
inline void* make_workspace(const Tensor& like, int64_t bytes, MaybeTensor& keep) {
  if (bytes == 0) return nullptr;
  keep = empty_on(like, {bytes}, ScalarType::Char);
  return keep->mutable_data_ptr();
}

inline MaybeTensor contiguous(const MaybeTensor& tensor) {
  if (!tensor) return std::nullopt;
  return torch::stable::contiguous(*tensor);
}

inline void check_activation_input(const std::string& op, const Tensor& x) {
  check_float(op, "x", x);
  SQK_CHECK(x.dim() >= 1 && x.size(x.dim() - 1) >= 1, op,
            ": x must have shape [..., K] with K >= 1, got ", tuple_text(x), ".");
}

// x [..., K] as rows of adjacent elements: the tensor itself where its strides allow, else a copy.
struct Rows {
  Tensor tensor;
  const void* data;
  int64_t stride;  // elements

  explicit Rows(const Tensor& x) : tensor(uniform(x) ? x : torch::stable::contiguous(x)) {
    data = tensor.const_data_ptr();
    stride = 0;
    // The stride of the innermost leading dimension that counts more than one row.
    for (int64_t i = tensor.dim() - 2; i >= 0 && stride == 0; --i) {
      if (tensor.size(i) > 1) stride = tensor.stride(i);
    }
  }

  static int64_t count(const Tensor& x) {
    int64_t rows = 1;
    for (int64_t i = 0; i + 1 < x.dim(); ++i) rows *= x.size(i);
    return rows;
  }

  // Whether one stride leads from each row to the next.
  static bool uniform(const Tensor& x) {
    const int64_t last = x.dim() - 1;
    if (x.size(last) > 1 && x.stride(last) != 1) return false;
    int64_t next = -1;  // what an outer dimension's stride must be
    for (int64_t i = last - 1; i >= 0; --i) {
      if (x.size(i) == 1) continue;
      if (next >= 0 && x.stride(i) != next) return false;
      next = x.stride(i) * x.size(i);
    }
    return true;
  }
};

// The checks that all quantisers share, and what they say of the scheme, the sizes and x's type.
inline void check_quantizer(const std::string& op, const Tensor& x, int64_t k,
                            const MaybeTensor& inv_smooth, const MaybeTensor& scale,
                            const std::string& granularity, QuantizeParams& params) {
  check_vector(op, "inv_smooth", inv_smooth, x, k, "one factor per channel of x");
  check_vector(op, "scale", scale, x, 1, "a static scale for the whole tensor");
  const bool per_tensor = granularity == "tensor";
  SQK_CHECK(per_tensor || granularity == "token", op,
            ": granularity must be 'token' or 'tensor', got '", granularity,
            "'; give `scale` for the static scheme.");
  params.scheme = scale        ? Scheme::kStatic
                  : per_tensor ? Scheme::kPerTensor
                               : Scheme::kPerToken;
  params.dtype = to_dtype(x.scalar_type());
  params.path = QuantizePath::kAuto;
  params.m = Rows::count(x);
  params.k = k;
}

}  // namespace sqk
