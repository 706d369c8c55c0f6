// Argument checks of the binding, one macro per rule. Each error message is a sentence that says
// what was passed.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

#include "stable.h"

// Everything after the condition is streamed into the message. STD_TORCH_CHECK would put the path
// of the source file before the sentence.
#define SQK_CHECK(condition, ...)                                         \
  do {                                                                    \
    if (!(condition)) throw std::runtime_error(sqk::concat(__VA_ARGS__)); \
  } while (0)

// "_saturate_s8: x must be float32, got dtype float16 of shape [4, 8]"
#define SQK_CHECK_DTYPE(op, tensor, expected)                                             \
  SQK_CHECK((tensor).scalar_type() == (expected), op ": " #tensor " must be ",            \
            sqk::dtype_name(expected), ", got ", sqk::dtype_name((tensor).scalar_type()), \
            " of shape ", sqk::shape_text(tensor))

// "_saturate_s8: CUDA error 209 (...); x [4, 8]"
#define SQK_CHECK_STATUS(op, status, ...)                                                    \
  do {                                                                                       \
    const sqk::Status sqk_status = (status);                                                 \
    SQK_CHECK(sqk_status == sqk::Status::kSuccess, op ": ", sqk::describe(sqk_status), "; ", \
              __VA_ARGS__);                                                                  \
  } while (0)

namespace sqk {

template <typename... Parts>
std::string concat(const Parts&... parts) {
  std::ostringstream out;
  ((out << parts), ...);
  return out.str();
}

// torch's spelling. A type that is not listed here appears as its number in c10/core/ScalarType.h.
inline std::string dtype_name(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Half:
      return "float16";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Char:
      return "int8";
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Bool:
      return "bool";
    default:
      return concat("scalar type ", static_cast<int>(dtype));
  }
}

inline std::string shape_text(const Tensor& tensor) {
  std::string text = "[";
  for (int64_t i = 0; i < tensor.dim(); ++i) {
    text += (i ? ", " : "") + std::to_string(tensor.size(i));
  }
  return text + "]";
}

}  // namespace sqk
