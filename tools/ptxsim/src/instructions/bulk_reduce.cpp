// Reductions of bulk and tensor copies in global memory.
#include <cmath>
#include <mutex>

#include "fp.h"
#include "instructions/bulk.h"
#include "tma.h"

namespace ptxsim {
// Data types of a tensor map.
enum { kTensorS32 = 3, kTensorS64 = 5, kTensorF16 = 6, kTensorF64 = 8, kTensorBf16 = 9 };

template <class T>
static T reduce_value(T a, T b, int op) {
  return op == 0 ? a + b : op == 1 ? std::fmin(a, b) : std::fmax(a, b);
}

template <class T>
static void reduce_ieee(u8* destination, const u8* source, int op) {
  T a, b;
  memcpy(&a, destination, sizeof a);
  memcpy(&b, source, sizeof b);
  a = reduce_value(a, b, op);
  memcpy(destination, &a, sizeof a);
}

static void reduce_short(u8* destination, const u8* source, bool half, int op) {
  u16 a, b;
  memcpy(&a, destination, 2);
  memcpy(&b, source, 2);
  float x = half ? half_bits_to_float(a) : bf16_to_float(a);
  float y = half ? half_bits_to_float(b) : bf16_to_float(b);
  float result = reduce_value(x, y, op);
  a = half ? float_to_half_bits(result) : float_to_bf16(result);
  memcpy(destination, &a, 2);
}

static void reduce_float(u8* destination, const u8* source, int data_type, int op) {
  if (data_type == kTensorF16 || data_type == kTensorBf16)
    reduce_short(destination, source, data_type == kTensorF16, op);
  else if (data_type == kTensorF64)
    reduce_ieee<double>(destination, source, op);
  else
    reduce_ieee<float>(destination, source, op);
}

static u64 reduce_integer(u64 a, u64 b, u32 bytes, bool is_signed, int op) {
  auto extend = [&](u64 value) {
    int shift = 64 - 8 * (int)bytes;
    return (i64)(value << shift) >> shift;
  };
  switch (op) {
    case 0:
      return a + b;
    case 1:
      return is_signed ? (u64)std::min(extend(a), extend(b)) : std::min(a, b);
    case 2:
      return is_signed ? (u64)std::max(extend(a), extend(b)) : std::max(a, b);
    case 3:
      return a >= b ? 0 : a + 1;
    case 4:
      return (a == 0 || a > b) ? b : a - 1;
    case 5:
      return a & b;
    case 6:
      return a | b;
    default:
      return a ^ b;
  }
}

void reduce_bytes(u8* destination, const u8* source, u32 bytes, int data_type, int op) {
  static std::mutex mutex;
  std::lock_guard<std::mutex> lock(mutex);
  u32 element_bytes = (u32)tensor_map_element_bytes(data_type);
  bool is_signed = data_type == kTensorS32 || data_type == kTensorS64;
  for (u32 k = 0; k < bytes; k += element_bytes) {
    if (data_type >= kTensorF16 && op <= 2) {
      reduce_float(destination + k, source + k, data_type, op);
      continue;
    }
    u64 a = 0, b = 0;
    memcpy(&a, destination + k, element_bytes);
    memcpy(&b, source + k, element_bytes);
    a = reduce_integer(a, b, element_bytes, is_signed, op);
    memcpy(destination + k, &a, element_bytes);
  }
}

int reduction_from_name(const Statement& statement) {
  static const char* names[] = {"add", "min", "max", "inc", "dec", "and", "or", "xor"};
  for (int k = 0; k < 8; k++)
    if (statement.has(names[k])) return k;
  return -1;
}
int data_type_of(Type type) {
  switch (type) {
    case kU32:
    case kB32:
      return 2;
    case kS32:
      return 3;
    case kU64:
    case kB64:
      return 4;
    case kS64:
      return 5;
    case kF16:
      return 6;
    case kF32:
      return 7;
    case kF64:
      return 8;
    case kBf16:
      return 9;
    case kU16:
    case kB16:
      return 1;
    case kU8:
    case kB8:
      return 0;
    default:
      return -1;
  }
}
}  // namespace ptxsim
