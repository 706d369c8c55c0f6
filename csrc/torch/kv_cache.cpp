// Binding of the writer of an int8 cache. The schema, fake and CPU kernels in Python are in
// smoothquant_kernels/.
#include "sqk/kv_cache.h"

#include "cache_call.h"

namespace sqk {
namespace {

constexpr const char* kAppend = "kv_append";

void check_rope(const Tensor& k, const MaybeTensor& cos, const MaybeTensor& sin) {
  SQK_CHECK(cos.has_value() == sin.has_value(), kAppend, ": give both of cos and sin, or neither.");
  if (!cos) return;
  const int64_t rows = cos->dim() == 3 && cos->size(0) == 1 ? 1 : k.size(0);
  const int64_t width = cos->dim() > 0 ? cos->size(cos->dim() - 1) : 0;
  SQK_CHECK(width % 2 == 0 && width >= 2 && width <= k.size(3), kAppend,
            ": cos and sin must have shape [B or 1, T, R] with R even and from 2 to ", k.size(3),
            ", got ", shape_text(*cos), ".");
  for (const auto& [name, table] : {std::pair{"cos", &*cos}, std::pair{"sin", &*sin}}) {
    check_float(kAppend, name, *table);
    check_shape(kAppend, name, *table, table->scalar_type(), {rows, k.size(2), width},
                "of each new token", k);
  }
}

// A table [B or 1, T, R] of that type with adjacent channels.
struct RopeTable {
  Tensor tensor;

  RopeTable(const Tensor& given, ScalarType dtype) : tensor(given) {
    if (given.scalar_type() != dtype) {
      tensor = new_rows(given, given.size(2), dtype);
      torch::stable::copy_(tensor, given);
    } else if (given.stride(2) != 1) {
      tensor = dense(given);
    }
  }
  int64_t batch_stride() const { return tensor.size(0) == 1 ? 0 : tensor.stride(0); }
};

// One half of the new tokens.
KvTokens tokens_of(const Tensor& x, const MaybeTensor& inverse, std::optional<Tokens>& keep,
                   MaybeTensor& kept_inverse) {
  const Tokens& rows = keep.emplace(x);
  KvTokens made = {rows.data(), rows.stride(0), rows.stride(1), rows.stride(2), nullptr};
  if (inverse) made.inv_smooth = floats(kept_inverse.emplace(dense(*inverse)));
  return made;
}

#ifdef SQK_CPU
void check_positions(const CacheCall& call, const KvAppendParams& p, int64_t capacity) {
  call.check_blocks([&](int64_t row) {
    const int64_t first = p.positions != nullptr ? p.positions[row] : 0;
    SQK_CHECK(first >= 0 && (first + p.tokens <= capacity || p.cache.ring != 0), kAppend,
              ": sequence ", row, " writes the positions ", first, " to ", first + p.tokens - 1,
              ", but the cache holds 0 to ", capacity - 1, "; make it larger.");
    return first + p.tokens;
  });
}
#endif

void kv_append_op(const Tensor& k, const Tensor& v, const Tensor& k_cache, const Tensor& v_cache,
                  const MaybeTensor& k_scale, const MaybeTensor& v_scale,
                  const MaybeTensor& positions, const MaybeTensor& block_table,
                  const MaybeTensor& k_inv_smooth, const MaybeTensor& v_inv_smooth,
                  const MaybeTensor& cos, const MaybeTensor& sin, int64_t rotation, bool ring) {
  Tokens::check(kAppend, "k", k);
  Tokens::check(kAppend, "v", v);
  const int64_t batch = k.size(0), heads = k.size(1), tokens = k.size(2);
  const int64_t dim = k.size(3), v_dim = v.size(3);
  check_shape(kAppend, "v", v, k.scalar_type(), {batch, heads, tokens, v_dim},
              "the tokens and heads of k", k);
  CacheCall call(kAppend, k, block_table, ring, heads);
  call.set(k_cache, k_scale, dim, v_cache, v_scale, v_dim);
  call.check_factors("k_inv_smooth", k_inv_smooth, dim);
  call.check_factors("v_inv_smooth", v_inv_smooth, v_dim);
  check_rope(k, cos, sin);
  call.check_counts("positions", positions, "of each first token");
  SQK_CHECK(tokens <= call.positions(), kAppend, ": ", tokens,
            " tokens do not fit into a cache of ", call.positions(), ".");

  KvAppendParams p = {};
  p.dtype = to_dtype(k.scalar_type());
  p.batch = batch;
  p.tokens = tokens;
  p.rotation = call.check_rotation(rotation, {dim, v_dim});
  const Launch launch(k);
  std::optional<Tokens> kept_k, kept_v;
  MaybeTensor kept_k_inverse, kept_v_inverse, kept_positions;
  p.k = tokens_of(k, k_inv_smooth, kept_k, kept_k_inverse);
  p.v = tokens_of(v, v_inv_smooth, kept_v, kept_v_inverse);
  p.cache = call.prepare();
  p.positions = CacheCall::prepare(positions, kept_positions);
  std::optional<RopeTable> kept_cos, kept_sin;
  if (cos) {
    const bool alike = cos->scalar_type() == sin->scalar_type();
    const ScalarType dtype = alike ? cos->scalar_type() : ScalarType::Float;
    const RopeTable& c = kept_cos.emplace(*cos, dtype);
    const RopeTable& s = kept_sin.emplace(*sin, dtype);
    p.rope_dtype = to_dtype(dtype);
    p.rope_dim = cos->size(2);
    p.cos = c.tensor.const_data_ptr();
    p.sin = s.tensor.const_data_ptr();
    p.cos_batch_stride = c.batch_stride();
    p.sin_batch_stride = s.batch_stride();
    p.cos_token_stride = c.tensor.stride(1);
    p.sin_token_stride = s.tensor.stride(1);
  }
#ifdef SQK_CPU
  check_positions(call, p, call.positions());
#endif
  const Status status = kv_append(p, launch.stream());
  SQK_CHECK(status == Status::kSuccess, kAppend, ": ", describe(status), "; k ", shape_text(k), " ",
            dtype_name(k.scalar_type()), ", k_cache ", shape_text(k_cache));
}

}  // namespace
}  // namespace sqk

STABLE_TORCH_LIBRARY_IMPL(smoothquant_kernels, SQK_DISPATCH_KEY, m) {
  m.impl("kv_append", TORCH_BOX(&sqk::kv_append_op));
}
