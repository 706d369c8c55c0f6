// Sizes and alignment, in plain C++: kernels use it, and so do plans, which need no GPU.
#pragma once

#include <cstdint>

namespace sqk {

// Neither operand is negative, and `by` is not 0.
template <typename Size, typename By>
constexpr auto divide_up(Size size, By by) {
  return (size + by - 1) / by;
}
template <typename Size, typename Multiple>
constexpr auto round_up(Size size, Multiple multiple) {
  return divide_up(size, multiple) * multiple;
}

inline bool is_aligned(const void* pointer, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % static_cast<uintptr_t>(bytes) == 0;
}
// Whether each of `rows` rows starts at a multiple of `bytes`. A single row may have any stride.
inline bool are_rows_aligned(const void* first, int64_t stride_bytes, int64_t rows, int64_t bytes) {
  return is_aligned(first, bytes) && (rows <= 1 || stride_bytes % bytes == 0);
}

// Buffers that share an allocation start at multiples of this many bytes.
constexpr int64_t kBufferAlignment = 256;

}  // namespace sqk
