// Argument checks that several ops share, with the messages of smoothquant_kernels/ops/checks.py.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "check.h"
#include "sqk/dtype.h"
#include "stable.h"

namespace sqk {

using MaybeTensor = std::optional<Tensor>;

// An op's `str` argument. TORCH_BOX's conversion to std::string leaks a string at every call (torch
// 2.13). So the ops take the handle, which they then own, and put it into a Text first.
class Text {
 public:
  explicit Text(StringHandle handle) : handle_(handle) {}
  Text(const Text&) = delete;
  Text& operator=(const Text&) = delete;
  ~Text() { torch_delete_string(handle_); }

  std::string_view view() const {
    size_t length = 0;
    const char* data = nullptr;
    SQK_TORCH_CALL(torch_string_length, handle_, &length);
    SQK_TORCH_CALL(torch_string_c_str, handle_, &data);
    return {data, length};
  }

 private:
  StringHandle handle_;
};

inline bool is_float(ScalarType dtype) {
  return dtype == ScalarType::Half || dtype == ScalarType::BFloat16 || dtype == ScalarType::Float;
}

// What torch calls a type of the kernels.
constexpr ScalarType to_scalar_type(DType dtype) {
  return visit(dtype, [](auto type) {
    constexpr DType kDType = decltype(type)::value;
    if constexpr (kDType == DType::kFloat32) {
      return ScalarType::Float;
    } else if constexpr (kDType == DType::kFloat16) {
      return ScalarType::Half;
    } else if constexpr (kDType == DType::kBFloat16) {
      return ScalarType::BFloat16;
    } else {
      static_assert(kDType == DType::kInt8, "what does torch call this type?");
      return ScalarType::Char;
    }
  });
}

// What is none of them becomes a number that every plan refuses.
inline DType to_dtype(ScalarType dtype) {
  int32_t found = 0;
  while (found < kDTypes && to_scalar_type(static_cast<DType>(found)) != dtype) ++found;
  return static_cast<DType>(found);
}

// "(4, 8)", "(4,)", "()": like a tuple in Python.
inline std::string tuple_text(const Tensor& tensor) {
  std::string text = "(";
  for (int64_t i = 0; i < tensor.dim(); ++i) {
    text += (i ? ", " : "") + std::to_string(tensor.size(i));
  }
  return text + (tensor.dim() == 1 ? ",)" : ")");
}

// The same for the shape [..., n] with the leading dimensions of x.
inline std::string output_shape_text(const Tensor& x, int64_t n) {
  std::string text = "(";
  for (int64_t i = 0; i + 1 < x.dim(); ++i) text += std::to_string(x.size(i)) + ", ";
  return text + std::to_string(n) + (x.dim() == 1 ? ",)" : ")");
}

inline bool same_shape(const Tensor& a, const Tensor& b) {
  const auto left = a.sizes(), right = b.sizes();
  return std::equal(left.begin(), left.end(), right.begin(), right.end());
}

inline void check_float(const char* op, const char* name, const Tensor& tensor) {
  SQK_CHECK(is_float(tensor.scalar_type()), op, ": ", name,
            " must be float16 or bfloat16 or float32, got ", dtype_name(tensor.scalar_type()), ".");
}

inline void check_device(const char* op, const char* name, const Tensor& tensor,
                         const Tensor& like) {
  SQK_CHECK(Place(tensor) == Place(like), op, ": ", name,
            " is on another device than the activation; move them to one device.");
}

// A float32 vector of `size` elements, or nothing.
inline void check_vector(const char* op, const char* name, const MaybeTensor& tensor,
                         const Tensor& like, int64_t size, const char* what) {
  if (!tensor) return;
  SQK_CHECK(tensor->scalar_type() == ScalarType::Float, op, ": ", name, " must be float32, got ",
            dtype_name(tensor->scalar_type()), ". Scales and smoothing factors stay in float32.");
  check_device(op, name, *tensor, like);
  SQK_CHECK(tensor->dim() == 1 && tensor->size(0) == size, op, ": ", name, " must have shape [",
            size, "] (", what, "), got ", tuple_text(*tensor), ".");
}

inline Tensor new_vector(const Tensor& like, int64_t size, ScalarType dtype) {
  return empty_on(like, &size, 1, dtype);
}

// A new tensor with the sizes of `like`, except for the last one.
inline Tensor new_rows(const Tensor& like, int64_t last, ScalarType dtype) {
  const auto sizes = like.sizes();
  Sizes changed(sizes.size());
  std::copy(sizes.begin(), sizes.end(), changed.data());
  if (!sizes.empty()) changed.data()[sizes.size() - 1] = last;
  return empty_on(like, changed.data(), sizes.size(), dtype);
}

// Scratch memory for one call, aligned to 64 bytes at least; null for 0 bytes. `keep` owns it, or
// nobody has to: a CPU thread keeps a block, which saves its small calls an allocation.
inline void* make_workspace(const Tensor& like, int64_t bytes, MaybeTensor& keep) {
  if (bytes == 0) return nullptr;
#ifdef SQK_CPU
  constexpr size_t kKept = 1 << 20, kAlignment = 64;
  if (static_cast<size_t>(bytes) <= kKept) {
    struct Free {
      void operator()(void* block) const { std::free(block); }
    };
    thread_local std::unique_ptr<void, Free> kept(std::aligned_alloc(kAlignment, kKept));
    if (kept != nullptr) return kept.get();
  }
#endif
  keep = new_vector(like, bytes, ScalarType::Char);
  return keep->mutable_data_ptr();
}

// The tensor itself if it is contiguous: the question is cheap, torch's `contiguous` op is not.
inline Tensor dense(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

inline MaybeTensor dense(const MaybeTensor& tensor) {
  if (!tensor) return std::nullopt;
  return dense(*tensor);
}

// For a tensor that is known to be float32: const_data_ptr<float>() would check again.
inline const float* floats(const Tensor& tensor) {
  return static_cast<const float*>(tensor.const_data_ptr());
}

// x [..., K] as rows of adjacent elements: the tensor itself if its strides allow, else a copy.
struct Rows {
  Tensor tensor;
  const void* data;
  int64_t stride;  // elements

  explicit Rows(const Tensor& x) : tensor(uniform(x) ? x : dense(x)) {
    data = tensor.const_data_ptr();
    stride = 0;
    const auto sizes = tensor.sizes(), strides = tensor.strides();
    // The stride of the innermost leading dimension that has more than one row.
    for (size_t i = sizes.size() - 1; i-- > 0 && stride == 0;) {
      if (sizes[i] > 1) stride = strides[i];
    }
  }

  static int64_t count(const Tensor& x) {
    const auto sizes = x.sizes();
    int64_t rows = 1;
    for (size_t i = 0; i + 1 < sizes.size(); ++i) rows *= sizes[i];
    return rows;
  }

  // Whether one stride leads from each row to the next.
  static bool uniform(const Tensor& x) {
    const auto sizes = x.sizes(), strides = x.strides();
    const size_t last = sizes.size() - 1;
    if (sizes[last] > 1 && strides[last] != 1) return false;
    int64_t next = -1;  // the stride that an outer dimension must have
    for (size_t i = last; i-- > 0;) {
      if (sizes[i] == 1) continue;
      if (next >= 0 && strides[i] != next) return false;
      next = strides[i] * sizes[i];
    }
    return true;
  }
};

}  // namespace sqk
