// Binding of the attention to an int8 cache. The schema, fake and CPU kernels in Python are in
// smoothquant_kernels/.
#include "sqk/attention.h"

#include "cache_call.h"

namespace sqk {
namespace {

constexpr const char* kAttention = "decode_attention_s8";

void check_query(const Tensor& q, const Tensor& k_cache) {
  Tokens::check(kAttention, "q", q);
  SQK_CHECK(q.size(2) <= kMaxQueryTokens, kAttention, ": q has ", q.size(2),
            " tokens of a sequence, at most ", kMaxQueryTokens,
            " are allowed; run a prompt on its float keys and values.");
  const int64_t heads = k_cache.dim() == 4 ? k_cache.size(1) : 0;
  SQK_CHECK(heads >= 1 && q.size(1) % heads == 0, kAttention,
            ": the heads of k_cache [blocks, H, block size, D] must divide those of q "
            "[B, Hq, T, D], got ",
            shape_text(k_cache), " and ", shape_text(q), ".");
}

void set_mask(AttentionParams& p, const Tensor& mask, const Tensor& q, int64_t capacity) {
  const bool has_dims = mask.dim() == 4;
  const auto fitting = [&](int64_t dim) {
    return has_dims && mask.size(dim) == 1 ? int64_t{1} : q.size(dim);
  };
  check_shape(kAttention, "mask", mask, ScalarType::Bool,
              {fitting(0), fitting(1), q.size(2), capacity}, "True: attend", q);
  p.mask = static_cast<const uint8_t*>(mask.const_data_ptr());
  p.mask_batch_stride = mask.size(0) == 1 ? 0 : mask.stride(0);
  p.mask_head_stride = mask.size(1) == 1 ? 0 : mask.stride(1);
  p.mask_token_stride = mask.stride(2);
  p.mask_column_stride = mask.stride(3);
}

#ifdef SQK_CPU
void check_lengths(const CacheCall& call, const AttentionParams& p, int64_t capacity) {
  call.check_blocks([&](int64_t row) {
    const int64_t length = p.lengths != nullptr ? p.lengths[row] : capacity;
    SQK_CHECK(length >= 0 && (length <= capacity || p.cache.ring != 0), kAttention, ": sequence ",
              row, " has ", length, " tokens, but the cache holds 0 to ", capacity, ".");
    return length;
  });
}
#endif

Tensor decode_attention_s8_op(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
                              double scale, const MaybeTensor& k_scale, const MaybeTensor& v_scale,
                              const MaybeTensor& lengths, const MaybeTensor& block_table,
                              const MaybeTensor& mask, const MaybeTensor& k_smooth,
                              const MaybeTensor& v_smooth, int64_t rotation, int64_t window,
                              bool ring) {
  check_query(q, k_cache);
  const int64_t dim = q.size(3);
  CacheCall call(kAttention, q, block_table, ring, k_cache.size(1));
  call.set(k_cache, k_scale, dim, v_cache, v_scale, dim);
  call.check_factors("k_smooth", k_smooth, dim);
  call.check_factors("v_smooth", v_smooth, dim);
  call.check_counts("lengths", lengths, "tokens of each sequence");
  SQK_CHECK(window >= 0, kAttention, ": window must be at least 0, got ", window, ".");

  AttentionParams p = {};
  p.dtype = to_dtype(q.scalar_type());
  p.batch = q.size(0);
  p.heads = q.size(1);
  p.tokens = q.size(2);
  p.scale = static_cast<float>(scale);
  p.rotation = call.check_rotation(rotation, {dim});
  p.window = window;
  if (mask) set_mask(p, *mask, q, call.positions());

  const Launch launch(q);
  const Tokens rows(q);
  p.q = rows.data();
  p.q_batch_stride = rows.stride(0);
  p.q_head_stride = rows.stride(1);
  p.q_token_stride = rows.stride(2);
  MaybeTensor kept_lengths, kept_k, kept_v, workspace;
  p.cache = call.prepare();
  p.lengths = CacheCall::prepare(lengths, kept_lengths);
  if (k_smooth) p.k_smooth = floats(kept_k.emplace(dense(*k_smooth)));
  if (v_smooth) p.v_smooth = floats(kept_v.emplace(dense(*v_smooth)));
#ifdef SQK_CPU
  check_lengths(call, p, call.positions());
#endif
  Tensor y = new_rows(q, dim, q.scalar_type());
  p.y = y.mutable_data_ptr();
  AttentionPlan made = {};
  Status status = plan(p, &made);
  if (status == Status::kSuccess) {
    p.workspace_bytes = made.workspace_bytes;
    p.workspace = make_workspace(q, made.workspace_bytes, workspace);
    status = decode_attention_s8(p, made, launch.stream());
  }
  SQK_CHECK(status == Status::kSuccess, kAttention, ": ", describe(status), "; q ", shape_text(q),
            " ", dtype_name(q.scalar_type()), ", k_cache ", shape_text(k_cache));
  return y;
}

}  // namespace
}  // namespace sqk

STABLE_TORCH_LIBRARY_IMPL(smoothquant_kernels, SQK_DISPATCH_KEY, m) {
  m.impl("decode_attention_s8", TORCH_BOX(&sqk::decode_attention_s8_op));
}
