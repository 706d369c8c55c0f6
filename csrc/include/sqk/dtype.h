// Element types that the kernels know. Public ring: no torch, no CUTLASS, compiles with a plain C++
// compiler.
#pragma once

#include <cstdint>
#include <type_traits>

namespace sqk {

// Every type: its bytes, whether it is a float, and its name. Everything below is made from this
// list, so a new row reaches every `visit`, which does not compile until it handles the type.
#define SQK_DTYPES(X)               \
  X(kFloat32, 4, true, "float32")   \
  X(kFloat16, 2, true, "float16")   \
  X(kBFloat16, 2, true, "bfloat16") \
  X(kInt8, 1, false, "int8")

#define SQK_ENUMERATOR(type, bytes, is_float, text) type,
enum class DType : int32_t { SQK_DTYPES(SQK_ENUMERATOR) };
#undef SQK_ENUMERATOR

struct DTypeFacts {
  int64_t bytes;
  bool is_float;
  const char* name;
};
#define SQK_FACTS(type, bytes, is_float, text) {bytes, is_float, text},
constexpr DTypeFacts kDTypeFacts[] = {SQK_DTYPES(SQK_FACTS)};
#undef SQK_FACTS
constexpr int kDTypes = sizeof(kDTypeFacts) / sizeof(kDTypeFacts[0]);

// Callers of the C entries may pass any number.
constexpr bool is_known(DType dtype) {
  return static_cast<int32_t>(dtype) >= 0 && static_cast<int32_t>(dtype) < kDTypes;
}
constexpr DTypeFacts facts_of(DType dtype) {
  return is_known(dtype) ? kDTypeFacts[static_cast<int32_t>(dtype)]
                         : DTypeFacts{0, false, "unknown"};
}
constexpr int64_t size_in_bytes(DType dtype) { return facts_of(dtype).bytes; }
constexpr bool is_float(DType dtype) { return facts_of(dtype).is_float; }
constexpr const char* name(DType dtype) { return facts_of(dtype).name; }

// A type as a constant that converts to DType.
template <DType kDType>
using DTypeConstant = std::integral_constant<DType, kDType>;

// The first wanted type at or after an index, or kDTypes if there is none.
constexpr int next_dtype(bool (*wanted)(DType), int index) {
  while (index < kDTypes && !wanted(static_cast<DType>(index))) ++index;
  return index;
}

// Returns f(DTypeConstant<dtype>{}), whose result type must be the same for all types. f is
// compiled for the wanted types only. `dtype` must be one of them: there is no comparison with the
// last one.
template <bool (*kWanted)(DType), int kIndex, typename F>
constexpr auto visit_from(DType dtype, F& f) {
  constexpr auto kType = static_cast<DType>(kIndex);
  constexpr int kNext = next_dtype(kWanted, kIndex + 1);
  if constexpr (kNext < kDTypes) {
    if (dtype != kType) return visit_from<kWanted, kNext>(dtype, f);
  }
  return f(DTypeConstant<kType>{});
}
template <bool (*kWanted)(DType), typename F>
constexpr auto visit_where(DType dtype, F&& f) {
  return visit_from<kWanted, next_dtype(kWanted, 0)>(dtype, f);
}

template <typename F>
constexpr auto visit(DType dtype, F&& f) {
  return visit_where<is_known>(dtype, f);
}
template <typename F>
constexpr auto visit_float(DType dtype, F&& f) {
  return visit_where<is_float>(dtype, f);
}

// For a static_assert that fails in the last branch of an `if constexpr`.
template <DType>
constexpr bool kNotHandled = false;

}  // namespace sqk
