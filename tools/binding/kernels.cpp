// Stand-ins for the kernels, with which the binding can be linked, loaded and called without a GPU.
// They are plain loops over float32 in host memory, and exact if the inputs allow it.
// tools/binding/load.py compares the results of the ops.
#include <algorithm>
#include <cmath>
#include <vector>

#include "sqk/attention.h"
#include "sqk/grouped.h"
#include "sqk/linear.h"
#include "sqk/quantize.h"
#include "sqk/saturate.h"

// The functions of libtorch_cuda that the binding calls. They are defined here, so that a torch
// without CUDA is enough.
extern "C" {
int32_t aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return 0;
}
int32_t aoti_torch_create_device_guard(int32_t, void** guard) {
  *guard = nullptr;
  return 0;
}
int32_t aoti_torch_delete_device_guard(void*) { return 0; }
}

namespace sqk {
namespace {

int8_t to_int8(float value) {
  if (std::isnan(value)) return 0;
  return static_cast<int8_t>(std::nearbyint(std::clamp(value, -128.0f, 127.0f)));
}

const float* row_of(const void* data, int64_t row, int64_t stride) {
  return static_cast<const float*>(data) + row * stride;
}

std::vector<float> produce(const QuantizeParams& p, int64_t row) {
  std::vector<float> v(row_of(p.x, row, p.x_stride), row_of(p.x, row, p.x_stride) + p.k);
  if (p.residual != nullptr) {
    float* sum = static_cast<float*>(p.sum) + row * p.sum_stride;
    for (int64_t i = 0; i < p.k; ++i) {
      sum[i] = v[i] = v[i] + row_of(p.residual, row, p.residual_stride)[i];
    }
  }
  double mean = 0, variance = 0;
  if (p.producer == Producer::kLayerNorm) {
    for (float value : v) mean += value / static_cast<double>(p.k);
  }
  for (float value : v) variance += (value - mean) * (value - mean) / static_cast<double>(p.k);
  for (int64_t i = 0; i < p.k; ++i) {
    if (is_norm(p.producer)) {
      v[i] = static_cast<float>((v[i] - mean) / std::sqrt(variance + p.eps));
      if (p.weight != nullptr) v[i] *= static_cast<const float*>(p.weight)[i];
      if (p.bias != nullptr) v[i] += static_cast<const float*>(p.bias)[i];
    }
    if (p.producer == Producer::kRelu) v[i] = std::max(v[i], 0.0f);
    if (p.inv_smooth != nullptr) v[i] *= p.inv_smooth[i];
  }
  for (int64_t h = 1; h < p.rotation; h *= 2) {
    for (int64_t i = 0; i < p.k; ++i) {
      if (i % (2 * h) >= h) continue;
      const float low = v[i], high = v[i + h];
      v[i] = low + high;
      v[i + h] = low - high;
    }
  }
  return v;
}

}  // namespace

const char* describe(Status) { return "the stand-in kernels do not serve this"; }

Status saturate_s8(const SaturateParams& p, cudaStream_t) {
  std::transform(p.x, p.x + p.numel, p.y, to_int8);
  return Status::kSuccess;
}

Status plan(const QuantizeParams& p, QuantizePlan* plan) {
  *plan = {};
  const bool served = p.producer <= Producer::kRelu && p.gate == nullptr;
  return served && p.dtype == DType::kFloat32 ? Status::kSuccess : Status::kUnsupportedShape;
}

Status quantize(const QuantizeParams& p, const QuantizePlan&, cudaStream_t) {
  std::vector<std::vector<float>> rows;
  std::vector<float> largest;
  for (int64_t row = 0; row < p.m; ++row) {
    rows.push_back(produce(p, row));
    float absmax = 0;
    for (float value : rows.back()) absmax = std::max(absmax, std::fabs(value));
    largest.push_back(absmax);
  }
  const float overall = *std::max_element(largest.begin(), largest.end());
  for (int64_t row = 0; row < p.m; ++row) {
    float scale = (p.scheme == Scheme::kPerTensor ? overall : largest[row]) / 127;
    if (p.scheme == Scheme::kStatic) scale = *p.scale;
    p.x_scale[p.scheme == Scheme::kPerTensor ? 0 : row] = scale;
    int8_t* x_q = p.x_q + row * p.x_q_stride;
    std::fill(x_q, x_q + p.k_padded, int8_t{0});
    for (int64_t i = 0; i < p.k; ++i) x_q[i] = to_int8(rows[row][i] / scale);
  }
  return Status::kSuccess;
}

// One block of gate and up. Far from 0, SiLU is ReLU.
void write_gated(const GemmParams& p, const std::vector<float>& products, int64_t row) {
  const int64_t channels = columns_of_y(p);
  for (int64_t c = 0; c < channels; ++c) {
    const float y = std::max(products[c], 0.0f) * products[channels + c];
    static_cast<int8_t*>(p.y)[row * p.y_stride + c] = to_int8(y / *p.out_scale);
  }
  p.y_scale[row] = *p.out_scale;
}

Status plan(const GemmParams& p, GemmPlan* plan) {
  *plan = {};
  const bool served = p.y_dtype == DType::kFloat32 || p.y_dtype == DType::kInt8;
  return served ? Status::kSuccess : Status::kUnsupportedShape;
}

// Element i of a row of the weight. Of 4 bits, the calls have the first group's first four.
int32_t weight(const GemmParams& p, int64_t column, int64_t i) {
  const int8_t value = p.w_q[column * p.w_q_stride + i];
  return is_w4(p) ? (value & 15) * p.w_group[2 * column] + p.w_group[2 * column + 1] : value;
}

Status gemm_s8(const GemmParams& p, const GemmPlan&, cudaStream_t) {
  for (int64_t row = 0; row < p.m; ++row) {
    std::vector<float> products;
    for (int64_t column = 0; column < p.n; ++column) {
      int32_t sum = 0;
      for (int64_t i = 0; i < p.k; ++i) {
        sum += p.x_q[row * p.x_q_stride + i] * weight(p, column, i);
      }
      float y = static_cast<float>(sum) * p.w_scale[p.w_per_channel ? column : 0] *
                p.x_scale[p.x_per_token ? row : 0];
      if (p.bias != nullptr) y += p.bias[column];
      if (p.residual != nullptr) y += row_of(p.residual, row, p.residual_stride)[column];
      if (p.relu) y = std::max(y, 0.0f);
      if (is_gated(p)) {
        products.push_back(y);
      } else if (p.y_dtype == DType::kInt8) {
        static_cast<int8_t*>(p.y)[row * p.y_stride + column] = to_int8(y / *p.out_scale);
      } else {
        static_cast<float*>(p.y)[row * p.y_stride + column] = y;
      }
    }
    if (is_gated(p)) write_gated(p, products, row);
  }
  return Status::kSuccess;
}

Status plan(const LinearParams& p, LinearPlan* plan) {
  *plan = {};
  const Status status = sqk::plan(p.quantize, &plan->quantize);
  return status == Status::kSuccess ? sqk::plan(p.gemm, &plan->gemm) : status;
}

Status linear_s8(const LinearParams& p, const LinearPlan& plan, cudaStream_t stream) {
  quantize(p.quantize, plan.quantize, stream);
  GemmParams gemm = p.gemm;
  gemm.x_q = p.quantize.x_q;
  gemm.x_scale = p.quantize.x_scale;
  gemm.x_per_token = p.quantize.scheme != Scheme::kPerTensor;
  return gemm_s8(gemm, plan.gemm, stream);
}

// Where a position is, in tokens of one head.
int64_t slot_of(const KvCache& cache, int64_t sequence, int64_t position, int64_t* block) {
  *block = cache.table == nullptr
               ? sequence
               : cache.table[sequence * cache.table_stride + position / cache.block_size];
  return position % cache.block_size;
}

int8_t* row_of(const KvHalf& half, int64_t block, int64_t head, int64_t slot) {
  return half.data + block * half.block_stride + head * half.head_stride +
         slot * padded_head(half.dim);
}
float* scale_of(const KvHalf& half, int64_t block, int64_t head, int64_t slot) {
  return half.scale + block * half.scale_block_stride + head * half.scale_head_stride + slot;
}

void append(const KvAppendParams& p, const KvTokens& tokens, const KvHalf& half, int64_t sequence,
            int64_t head, int64_t token) {
  QuantizeParams q = {};
  q.k = half.dim;
  q.x = static_cast<const float*>(tokens.data) + sequence * tokens.batch_stride +
        head * tokens.head_stride + token * tokens.token_stride;
  if (tokens.inv_smooth != nullptr) q.inv_smooth = tokens.inv_smooth + head * half.dim;
  q.rotation = p.rotation;
  const std::vector<float> v = produce(q, 0);
  float absmax = 0;
  for (float value : v) absmax = std::max(absmax, std::fabs(value));
  int64_t block = 0;
  const int64_t position = (p.positions != nullptr ? p.positions[sequence] : 0) + token;
  const int64_t slot = slot_of(p.cache, sequence, position, &block);
  const float scale = half.scale != nullptr ? absmax / 127 : 1.0f;
  if (half.scale != nullptr) *scale_of(half, block, head, slot) = scale;
  int8_t* to = row_of(half, block, head, slot);
  std::fill(to, to + padded_head(half.dim), int8_t{0});
  for (int64_t i = 0; i < half.dim; ++i) to[i] = to_int8(v[i] / scale);
}

Status kv_append(const KvAppendParams& p, cudaStream_t) {
  if (p.dtype != DType::kFloat32 || p.cos != nullptr) return Status::kUnsupportedShape;
  for (int64_t b = 0; b < p.batch; ++b) {
    for (int64_t head = 0; head < p.cache.heads; ++head) {
      for (int64_t token = 0; token < p.tokens; ++token) {
        append(p, p.k, p.cache.k, b, head, token);
        append(p, p.v, p.cache.v, b, head, token);
      }
    }
  }
  return Status::kSuccess;
}

Status plan(const AttentionParams& p, AttentionPlan* plan) {
  *plan = {};
  const bool served = p.dtype == DType::kFloat32 && p.rotation == 0 && p.cache.k.scale != nullptr;
  return served ? Status::kSuccess : Status::kUnsupportedShape;
}

// One token of one query head, with a query that is int8 already.
void attend(const AttentionParams& p, int64_t sequence, int64_t head, int64_t token) {
  const KvCache& cache = p.cache;
  const int64_t dim = cache.k.dim, own = head / (p.heads / cache.heads);
  const int64_t length = p.lengths != nullptr ? p.lengths[sequence] : capacity(cache);
  const auto* q = static_cast<const float*>(p.q) + sequence * p.q_batch_stride +
                  head * p.q_head_stride + token * p.q_token_stride;
  std::vector<double> y(static_cast<size_t>(dim));
  double total = 0;
  for (int64_t i = 0; i <= length - p.tokens + token; ++i) {
    if (p.mask != nullptr && p.mask[sequence * p.mask_batch_stride + head * p.mask_head_stride +
                                    token * p.mask_token_stride + i * p.mask_column_stride] == 0) {
      continue;
    }
    int64_t block = 0;
    const int64_t slot = slot_of(cache, sequence, i, &block);
    double score = 0;
    for (int64_t c = 0; c < dim; ++c) score += q[c] * row_of(cache.k, block, own, slot)[c];
    const double weight = std::exp(score * *scale_of(cache.k, block, own, slot) * p.scale);
    total += weight;
    for (int64_t c = 0; c < dim; ++c) {
      y[c] += weight * row_of(cache.v, block, own, slot)[c] * *scale_of(cache.v, block, own, slot);
    }
  }
  float* to = static_cast<float*>(p.y) + ((sequence * p.heads + head) * p.tokens + token) * dim;
  for (int64_t c = 0; c < dim; ++c) to[c] = total > 0 ? static_cast<float>(y[c] / total) : 0.0f;
}

Status decode_attention_s8(const AttentionParams& p, const AttentionPlan&, cudaStream_t) {
  for (int64_t b = 0; b < p.batch; ++b) {
    for (int64_t head = 0; head < p.heads; ++head) {
      for (int64_t token = 0; token < p.tokens; ++token) attend(p, b, head, token);
    }
  }
  return Status::kSuccess;
}

Status plan(const GroupedParams& p, GroupedPlan* plan) {
  *plan = {};
  return p.y_dtype == DType::kFloat32 ? Status::kSuccess : Status::kUnsupportedShape;
}

Status grouped_gemm_s8(const GroupedParams& p, const GroupedPlan&, cudaStream_t) {
  float* const y = static_cast<float*>(p.y);
  std::fill(y, y + p.m * p.n, 0.0f);
  for (int64_t e = 0; e < p.experts; ++e) {
    for (int64_t row = p.offsets[e]; row < p.offsets[e + 1]; ++row) {
      const int8_t* x = p.x_q + (p.rows != nullptr ? p.rows[row] : row) * p.x_q_stride;
      for (int64_t n = 0; n < p.n; ++n) {
        const int8_t* w = p.w_q + e * p.w_q_expert_stride + n * p.w_q_stride;
        int32_t sum = 0;
        for (int64_t i = 0; i < p.k; ++i) sum += x[i] * w[i];
        float v = static_cast<float>(sum) * p.w_scale[e * p.n + n];
        v *= p.x_scale[p.x_per_token ? row : 0];
        y[row * p.y_stride + n] = p.bias != nullptr ? v + p.bias[e * p.n + n] : v;
      }
    }
  }
  return Status::kSuccess;
}

Status combine_experts(const CombineParams& p, cudaStream_t) {
  const bool served = p.dtype == DType::kFloat32 && p.weights_dtype == DType::kFloat32;
  if (!served) return Status::kUnsupportedShape;
  for (int64_t token = 0; token < p.tokens; ++token) {
    for (int64_t n = 0; n < p.n; ++n) {
      float sum = 0;
      for (int64_t at = token * p.choices; at < (token + 1) * p.choices; ++at) {
        sum +=
            static_cast<const float*>(p.weights)[at] * row_of(p.y, p.position[at], p.y_stride)[n];
      }
      static_cast<float*>(p.out)[token * p.out_stride + n] = sum;
    }
  }
  return Status::kSuccess;
}

}  // namespace sqk
