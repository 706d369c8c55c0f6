// What the ops with an int8 cache of keys and values share: their checks, with the messages of
// smoothquant_kernels/ops/cache_checks.py, and the parameters of the kernels. Binding ring.
#pragma once

#include <initializer_list>
#include <optional>
#include <string>

#include "arguments.h"
#include "common/arithmetic.h"
#include "sqk/kv_cache.h"
#include "sqk/quantize.h"

namespace sqk {

// "[4, 8]"
inline std::string list_text(std::initializer_list<int64_t> sizes) {
  std::string text = "[";
  for (int64_t size : sizes) text += (text.size() > 1 ? ", " : "") + std::to_string(size);
  return text + "]";
}

inline bool has_shape(const Tensor& tensor, std::initializer_list<int64_t> shape) {
  const auto sizes = tensor.sizes();
  return std::equal(sizes.begin(), sizes.end(), shape.begin(), shape.end());
}

inline void check_shape(const char* op, const char* name, const Tensor& tensor, ScalarType dtype,
                        std::initializer_list<int64_t> shape, const char* what,
                        const Tensor& like) {
  SQK_CHECK(tensor.scalar_type() == dtype, op, ": ", name, " must be ", dtype_name(dtype), ", got ",
            dtype_name(tensor.scalar_type()), ".");
  check_device(op, name, tensor, like);
  SQK_CHECK(has_shape(tensor, shape), op, ": ", name, " must have shape ", list_text(shape), " (",
            what, "), got ", shape_text(tensor), ".");
}
inline void check_shape(const char* op, const char* name, const MaybeTensor& tensor,
                        ScalarType dtype, std::initializer_list<int64_t> shape, const char* what,
                        const Tensor& like) {
  if (tensor) check_shape(op, name, *tensor, dtype, shape, what, like);
}

// Tokens [B, H, T, D], themselves if channels are adjacent, else a copy.
class Tokens {
 public:
  static void check(const char* op, const char* name, const Tensor& x) {
    check_float(op, name, x);
    SQK_CHECK(x.dim() == 4 && x.size(3) >= 1 && x.size(3) <= kMaxHead && x.size(1) >= 1, op, ": ",
              name, " must have shape [B, H, T, D] with H >= 1 and D from 1 to ", kMaxHead,
              ", got ", shape_text(x), ".");
  }

  explicit Tokens(const Tensor& x) : tensor_(x.stride(3) == 1 || x.size(3) == 1 ? x : dense(x)) {}
  const void* data() const { return tensor_.const_data_ptr(); }
  int64_t stride(int64_t dim) const { return tensor_.stride(dim); }

 private:
  Tensor tensor_;
};

// The arguments that say what and where a cache is. `x` [B, H or Hq, T, D], whose check comes
// first, are its tokens or queries. The tensors must outlive it.
class CacheCall {
 public:
  CacheCall(const char* op, const Tensor& x, const MaybeTensor& block_table, bool ring,
            int64_t heads)
      : op_(op), x_(x), table_(block_table), batch_(x.size(0)) {
    cache_.heads = heads;
    cache_.ring = ring ? 1 : 0;
  }

  // Checks both halves of the cache, their scales, and the table.
  void set(const Tensor& k_cache, const MaybeTensor& k_scale, int64_t k_dim, const Tensor& v_cache,
           const MaybeTensor& v_scale, int64_t v_dim) {
    SQK_CHECK(k_cache.dim() == 4, op_, ": k_cache must have shape [blocks, ", cache_.heads,
              ", block size, ", padded_head(k_dim), "], got ", shape_text(k_cache), ".");
    cache_.blocks = k_cache.size(0);
    cache_.block_size = k_cache.size(2);
    cache_.k = half("k_cache", k_cache, "k_scale", k_scale, k_dim);
    cache_.v = half("v_cache", v_cache, "v_scale", v_scale, v_dim);
    SQK_CHECK(k_scale.has_value() == v_scale.has_value(), op_,
              ": give both of k_scale and v_scale (per token), or neither (static).");
    if (!table_) {
      SQK_CHECK(cache_.blocks == batch_, op_,
                ": without a block table each sequence has one block, got ", batch_,
                " sequences and ", cache_.blocks, " blocks.");
      return;
    }
    SQK_CHECK(cache_.ring == 0, op_,
              ": a ring has no block table; drop one of `ring` and `block_table`.");
    const int64_t count = table_->dim() == 2 ? table_->size(1) : 1;
    check_shape(op_, "block_table", table_, ScalarType::Int, {batch_, count},
                "the blocks of each sequence", x_);
    SQK_CHECK(batch_ <= cache_.blocks, op_, ": ", batch_,
              " sequences need at least one block each, but the cache has ", cache_.blocks,
              " blocks; make it larger, or run fewer sequences at once.");
    cache_.table_stride = count;
  }

  // Factors per head and channel, which static scales cannot do without.
  void check_factors(const char* name, const MaybeTensor& factors, int64_t dim) const {
    check_shape(op_, name, factors, ScalarType::Float, {cache_.heads, dim},
                "a factor per head and channel", x_);
    SQK_CHECK(factors || !is_static(), op_, ": without scales per token (dynamic), ", name, " ",
              list_text({cache_.heads, dim}), " must give the static scales.");
  }

  int32_t check_rotation(int64_t rotation, std::initializer_list<int64_t> dims) const {
    for (int64_t dim : dims) {
      SQK_CHECK(fits_rotation(rotation, dim), op_,
                ": rotation must be 0 or a power of two from 2 that divides D = ", dim, ", got ",
                rotation, ".");
    }
    SQK_CHECK(rotation == 0 || !is_static(), op_,
              ": static scales are those of channels before the rotation; drop `rotation`, or give "
              "scales per token.");
    return static_cast<int32_t>(rotation);
  }

  void check_counts(const char* name, const MaybeTensor& counts, const char* what) const {
    check_shape(op_, name, counts, ScalarType::Int, {batch_}, what, x_);
  }

  int64_t positions() const {
    return cache_.block_size * (table_ ? cache_.table_stride : int64_t{1});
  }

  // Makes the table dense, when the device is current, and returns the whole.
  const KvCache& prepare() {
    static const int32_t kNoBlocks = 0;  // an empty tensor has no address, and null means no table
    cache_.table = prepare(table_, kept_table_);
    if (table_ && cache_.table == nullptr) cache_.table = &kNoBlocks;
    return cache_;
  }

  static const int32_t* prepare(const MaybeTensor& numbers, MaybeTensor& keep) {
    if (!numbers) return nullptr;
    return static_cast<const int32_t*>(keep.emplace(dense(*numbers)).const_data_ptr());
  }

#ifdef SQK_CPU
  // used(sequence) checks and returns how many of its first positions a call may touch. Checks the
  // blocks that hold them. Only a CPU can read these numbers without waiting for a device.
  template <typename Used>
  void check_blocks(const Used& used) const {
    for (int64_t row = 0; row < batch_; ++row) {
      const int64_t tokens = used(row);
      if (cache_.table == nullptr || cache_.block_size == 0) continue;
      const int32_t* blocks = cache_.table + row * cache_.table_stride;
      for (int64_t i = 0; i < divide_up(tokens, cache_.block_size); ++i) {
        SQK_CHECK(blocks[i] >= 0 && blocks[i] < cache_.blocks, op_, ": block_table gives sequence ",
                  row, " block ", blocks[i], ", but the cache has blocks 0 to ", cache_.blocks - 1,
                  ".");
      }
    }
  }
#endif

 private:
  bool is_static() const { return !has_scales_; }

  KvHalf half(const char* name, const Tensor& cache, const char* scale_name,
              const MaybeTensor& scale, int64_t dim) {
    const int64_t width = padded_head(dim);
    SQK_CHECK(cache.scalar_type() == ScalarType::Char, op_, ": ", name, " must be int8, got ",
              dtype_name(cache.scalar_type()), ".");
    check_device(op_, name, cache, x_);
    SQK_CHECK(has_shape(cache, {cache_.blocks, cache_.heads, cache_.block_size, width}), op_, ": ",
              name, " must have shape ",
              list_text({cache_.blocks, cache_.heads, cache_.block_size, width}), " (heads of ",
              dim, " channels, padded to a multiple of ", kHeadMultiple, "), got ",
              shape_text(cache), ".");
    const bool empty = cache_.blocks * cache_.heads * cache_.block_size == 0;
    SQK_CHECK(empty || (cache.stride(3) == 1 && cache.stride(2) == width), op_,
              ": the tokens of a head must be adjacent in ", name, " (strides [.., .., ", width,
              ", 1]); only blocks and heads may be strided.");
    KvHalf made = {};
    made.data = static_cast<int8_t*>(const_cast<void*>(cache.const_data_ptr()));
    made.block_stride = cache.stride(0);
    made.head_stride = cache.stride(1);
    made.dim = dim;
#ifndef SQK_CPU
    constexpr int64_t kCopy = 16;  // bytes
    SQK_CHECK(empty || (is_aligned(made.data, kCopy) && made.block_stride % kCopy == 0 &&
                        made.head_stride % kCopy == 0),
              op_, ": each head of ", name, " must start at a multiple of 16 bytes.");
#endif
    if (!scale) return made;
    has_scales_ = true;
    check_shape(op_, scale_name, scale, ScalarType::Float,
                {cache_.blocks, cache_.heads, cache_.block_size}, "one scale per token and head",
                x_);
    SQK_CHECK(empty || scale->stride(2) == 1, op_, ": the tokens of a head must be adjacent in ",
              scale_name, ".");
    made.scale = const_cast<float*>(floats(*scale));
    made.scale_block_stride = scale->stride(0);
    made.scale_head_stride = scale->stride(1);
    return made;
  }

  const char* op_;
  const Tensor& x_;
  const MaybeTensor& table_;
  int64_t batch_;
  KvCache cache_ = {};
  bool has_scales_ = false;  // an empty tensor has no address
  MaybeTensor kept_table_;
};

}  // namespace sqk
