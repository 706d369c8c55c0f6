// What a kernel launcher returns. Public ring: no torch, no CUTLASS, compiles with a plain C++
// compiler.
#pragma once

#include <cstdint>

// Declared as the CUDA headers declare it, so that callers need no toolkit to name a stream.
typedef struct CUstream_st* cudaStream_t;

// The library hides its symbols; these few are its C interface.
#define SQK_EXPORT __attribute__((visibility("default")))

namespace sqk {

// Codes below kCudaBase are ours; kCudaBase + e is the CUDA error e. One number crosses the C
// interface, and nothing is lost that the binding needs for its sentence.
enum class Status : int32_t {
  kSuccess = 0,
  kInvalidArgument = 1,   // a size, stride or pointer that the launcher's comment rules out
  kUnsupportedArch = 2,   // no kernel of this library runs on the current GPU
  kUnsupportedShape = 3,  // a legal problem that no tile of this library covers
  kWorkspaceTooSmall = 4,
  kExcludedTile = 5,  // SQK_WITHOUT_TILES rules out the tile that was asked for, or all that serve
  kUnknownTile = 6,   // SQK_WITHOUT_TILES names a row that no table of this library has
  kCudaBase = 10000,
};

inline Status status_from_cuda(int32_t error) {
  return error == 0 ? Status::kSuccess
                    : static_cast<Status>(static_cast<int32_t>(Status::kCudaBase) + error);
}

inline bool is_cuda_error(Status status) {
  return static_cast<int32_t>(status) > static_cast<int32_t>(Status::kCudaBase);
}

// A phrase for people: "the GPU is not supported", "CUDA error 209
// (cudaErrorNoKernelImageForDevice): ...". The pointer stays valid until the same thread asks
// again.
const char* describe(Status status);

}  // namespace sqk
