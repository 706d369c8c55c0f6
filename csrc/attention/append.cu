// Launches the writer of an int8 cache. Kernel ring: no torch.
#include <cuda_runtime.h>

#include <algorithm>

#include "attention/append.cuh"
#include "common/launch.h"
#include "common/valid.h"

namespace sqk {
namespace {

using AppendKernel = void (*)(AppendParams);

constexpr int64_t kMaxPositions = int64_t{1} << 31;  // they are int32
constexpr int64_t kMaxAppendRows = kMaxPositions - 1;

bool is_half_valid(const KvHalf& half, const KvTokens& from, int64_t rotation) {
  return half.dim >= 1 && half.dim <= kMaxHead && fits_rotation(rotation, half.dim) &&
         half.data != nullptr && from.data != nullptr && is_aligned(half.data, kAppendChannels) &&
         half.block_stride % kAppendChannels == 0 && half.head_stride % kAppendChannels == 0 &&
         (half.scale != nullptr || (from.inv_smooth != nullptr && rotation == 0));
}

Status check(const KvAppendParams& p) {
  const KvCache& cache = p.cache;
  const bool has_rope = p.cos != nullptr;
  if (!is_float(p.dtype) || p.batch < 0 || p.tokens < 0 || cache.heads < 1 || cache.blocks < 0 ||
      cache.block_size < 0 || p.tokens > capacity(cache) ||
      (cache.ring != 0 && cache.table != nullptr) ||
      (cache.table == nullptr && cache.blocks < p.batch) || has_rope != (p.sin != nullptr)) {
    return Status::kInvalidArgument;
  }
  if (has_rope && (!is_float(p.rope_dtype) || p.rope_dim < 2 || p.rope_dim % 2 != 0 ||
                   p.rope_dim > cache.k.dim)) {
    return Status::kInvalidArgument;
  }
  if (p.batch == 0 || p.tokens == 0) return Status::kSuccess;
  if (!is_half_valid(cache.k, p.k, p.rotation) || !is_half_valid(cache.v, p.v, p.rotation) ||
      (cache.k.scale == nullptr) != (cache.v.scale == nullptr)) {
    return Status::kInvalidArgument;
  }
  const bool counts = p.batch <= kMaxAppendRows && p.tokens <= kMaxAppendRows / p.batch &&
                      cache.heads <= kMaxAppendRows / (p.batch * p.tokens);
  return counts && cache.block_size < kMaxPositions ? Status::kSuccess : Status::kUnsupportedShape;
}

// Whether 16 bytes at a time can be read of each row.
bool reads_vectors(const KvTokens& from, int64_t dim, const KvAppendParams& p) {
  const int64_t bytes = size_in_bytes(p.dtype);
  return dim % kAppendChannels == 0 &&
         are_rows_aligned(from.data, from.batch_stride * bytes, p.batch, 16) &&
         are_rows_aligned(from.data, from.head_stride * bytes, p.cache.heads, 16) &&
         are_rows_aligned(from.data, from.token_stride * bytes, p.tokens, 16) &&
         is_aligned(from.inv_smooth, 16);
}
bool reads_rope_vectors(const KvAppendParams& p) {
  if (p.cos == nullptr) return true;
  const int64_t bytes = size_in_bytes(p.rope_dtype);
  const auto aligned = [&](const void* first, int64_t batch_stride, int64_t token_stride) {
    return are_rows_aligned(first, batch_stride * bytes, p.batch, 16) &&
           are_rows_aligned(first, token_stride * bytes, p.tokens, 16);
  };
  return p.rope_dim % (2 * kAppendChannels) == 0 &&
         aligned(p.cos, p.cos_batch_stride, p.cos_token_stride) &&
         aligned(p.sin, p.sin_batch_stride, p.sin_token_stride);
}

AppendKernel find_kernel(DType dtype, bool vectors) {
  return visit_float(dtype, [&](auto type) -> AppendKernel {
    using T = Element<decltype(type)>;
    return vectors ? kv_append_kernel<T, true> : kv_append_kernel<T, false>;
  });
}

}  // namespace

Status kv_append(const KvAppendParams& params, cudaStream_t stream) {
  Status status = check(params);
  if (status != Status::kSuccess || params.batch == 0 || params.tokens == 0) return status;
  Device device;
  status = current_device(&device);
  if (status != Status::kSuccess) return status;

  const KvCache& cache = params.cache;
  AppendParams append = {};
  append.q = params;
  append.rows = static_cast<int32_t>(params.batch * cache.heads * params.tokens);
  append.shift = 3;
  while (kAppendChannels << append.shift < std::max(cache.k.dim, cache.v.dim)) ++append.shift;
  append.holding = std::min(capacity(cache), kMaxPositions);
  append.tokens = cutlass::FastDivmod(static_cast<int>(params.tokens));
  append.heads = cutlass::FastDivmod(static_cast<int>(cache.heads));
  append.block_size = cutlass::FastDivmod(static_cast<int>(cache.block_size));

  const bool vectors = reads_vectors(params.k, cache.k.dim, params) &&
                       reads_vectors(params.v, cache.v.dim, params) && reads_rope_vectors(params);
  KernelLaunch launch = {};
  launch.function = reinterpret_cast<const void*>(find_kernel(params.dtype, vectors));
  const int64_t blocks = divide_up(int64_t{append.rows}, kAppendThreads >> append.shift);
  launch.grid = dim3(static_cast<unsigned>(blocks), 2);  // k and v
  launch.block = dim3(kAppendThreads);
  launch.stream = stream;
  launch.overlap = may_overlap(device);
  return launch_kernel(launch, &append);
}

}  // namespace sqk

extern "C" int32_t sqk_kv_append(const sqk::KvAppendParams* params, void* stream) {
  return static_cast<int32_t>(sqk::kv_append(*params, static_cast<cudaStream_t>(stream)));
}
