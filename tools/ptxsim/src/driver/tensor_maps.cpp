// Tensor maps: the rules of cuTensorMapEncodeTiled, and the form that the simulator gives them.
#include "driver/driver.h"
#include "tma.h"

using namespace ptxsim;

namespace {
typedef unsigned long long Number;

struct Request {
  CUtensorMapDataType type;
  u32 rank;
  void* address;
  const cuuint64_t* dim;
  const cuuint64_t* stride;  // without the innermost one, which is 1
  const cuuint32_t* box;
  const cuuint32_t* element_stride;
  CUtensorMapInterleave interleave;
  CUtensorMapSwizzle swizzle;
  CUtensorMapFloatOOBfill fill;
  int element_bytes() const { return tensor_map_element_bytes(type); }
};

// Each check returns what is wrong; nothing when all is right.
std::string check_arguments(const Request& request) {
  if (request.rank < 1 || request.rank > 5) return format("rank %u is not in 1..5", request.rank);
  if (!request.element_bytes()) return format("data type %d is not supported", (int)request.type);
  if (request.interleave != CU_TENSOR_MAP_INTERLEAVE_NONE)
    return "interleaved layouts are not supported by ptxsim";
  if (!request.address || ((u64)request.address & 15))
    return format("globalAddress %p is not 16-byte aligned", request.address);
  if (request.swizzle < 0 || request.swizzle > CU_TENSOR_MAP_SWIZZLE_128B)
    return format("swizzle mode %d is not supported by ptxsim", (int)request.swizzle);
  if (request.fill && request.type < CU_TENSOR_MAP_DATA_TYPE_FLOAT16)
    return "NaN out-of-bounds fill needs a floating-point type";
  return "";
}

std::string check_dimension(const Request& request, u32 d) {
  if (!request.dim[d] || request.dim[d] > (1ull << 32))
    return format("globalDim[%u] = %llu is not in 1..2^32", d, (Number)request.dim[d]);
  if (!request.box[d] || request.box[d] > 256)
    return format("boxDim[%u] = %u is not in 1..256", d, request.box[d]);
  if (!request.element_stride[d] || request.element_stride[d] > 8)
    return format("elementStrides[%u] = %u is not in 1..8", d, request.element_stride[d]);
  if (!d) return "";
  u64 stride = request.stride[d - 1];
  u64 row_bytes = request.dim[0] * (u64)request.element_bytes();
  if (stride % 16 || stride >= (1ull << 40))
    return format("globalStrides[%u] = %llu must be a multiple of 16 below 2^40", d - 1,
                  (Number)stride);
  if (d == 1 && stride < row_bytes)
    return format("globalStrides[0] = %llu is smaller than a row of %llu bytes", (Number)stride,
                  (Number)row_bytes);
  return "";
}

// Bytes of a row of the box that a swizzle mode allows.
u64 swizzle_span(CUtensorMapSwizzle swizzle) {
  switch (swizzle) {
    case CU_TENSOR_MAP_SWIZZLE_32B:
      return 32;
    case CU_TENSOR_MAP_SWIZZLE_64B:
      return 64;
    case CU_TENSOR_MAP_SWIZZLE_128B:
      return 128;
    default:
      return ~0ull;
  }
}

std::string check_box(const Request& request) {
  u64 inner = (u64)request.box[0] * (u64)request.element_bytes();
  u64 span = swizzle_span(request.swizzle);
  if (inner % 16)
    return format("inner box dimension of %llu bytes is not a multiple of 16", (Number)inner);
  if (inner > span)
    return format("inner box dimension of %llu bytes exceeds the swizzle span of %llu",
                  (Number)inner, (Number)span);
  return "";
}

std::string check(const Request& request) {
  std::string problem = check_arguments(request);
  for (u32 d = 0; d < request.rank && problem.empty(); d++) problem = check_dimension(request, d);
  return problem.empty() ? check_box(request) : problem;
}

TensorMap encode(const Request& request) {
  TensorMap map;
  memset(&map, 0, sizeof map);
  map.magic = kTmapMagic;
  map.address = (u64)request.address;
  for (u32 d = 0; d < request.rank; d++) {
    map.dim_minus_one[d] = (u32)(request.dim[d] - 1);
    map.box[d] = (u16)request.box[d];
    map.element_stride[d] = (u8)request.element_stride[d];
    if (d) map.stride[d - 1] = request.stride[d - 1];
  }
  map.data_type = (u8)request.type;
  map.rank = (u8)request.rank;
  map.interleave = (u8)request.interleave;
  map.swizzle = (u8)request.swizzle;
  map.out_of_bounds = (u8)request.fill;
  return map;
}
}  // namespace

API CUresult cuTensorMapEncodeTiled(CUtensorMap* result, CUtensorMapDataType type, cuuint32_t rank,
                                    void* address, const cuuint64_t* dim, const cuuint64_t* stride,
                                    const cuuint32_t* box, const cuuint32_t* element_stride,
                                    CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                    CUtensorMapL2promotion l2, CUtensorMapFloatOOBfill fill) {
  Request request{type, rank, address, dim, stride, box, element_stride, interleave, swizzle, fill};
  std::string problem =
      !result || ((u64)result & 63) ? "the tensor map must be 64-byte aligned" : check(request);
  if (!problem.empty()) {
    fprintf(stderr, "ptxsim: cuTensorMapEncodeTiled: %s\n", problem.c_str());
    return CUDA_ERROR_INVALID_VALUE;
  }
  TensorMap map = encode(request);
  map.l2 = (u8)l2;
  memcpy(result, &map, sizeof map);
  return CUDA_SUCCESS;
}
API CUresult cuTensorMapReplaceAddress(CUtensorMap* tensor_map, void* address) {
  TensorMap map;
  memcpy(&map, tensor_map, sizeof map);
  if (map.magic != kTmapMagic || ((u64)address & 15)) return CUDA_ERROR_INVALID_VALUE;
  map.address = (u64)address;
  memcpy(tensor_map, &map, sizeof map);
  return CUDA_SUCCESS;
}
API CUresult cuTensorMapEncodeIm2col(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*,
                                     const cuuint64_t*, const cuuint64_t*, const int*, const int*,
                                     cuuint32_t, cuuint32_t, const cuuint32_t*,
                                     CUtensorMapInterleave, CUtensorMapSwizzle,
                                     CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  fprintf(stderr, "ptxsim: im2col tensor maps are not supported\n");
  return CUDA_ERROR_NOT_SUPPORTED;
}
