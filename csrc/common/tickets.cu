// Who owns which tickets. Kernel ring: no torch.
#include <map>
#include <mutex>
#include <utility>
#include <vector>

#include "common/launch.h"
#include "common/tickets.h"

namespace sqk {
namespace {

constexpr int kOwners = 512;  // 1.25 MiB per GPU
__device__ uint32_t all_tickets[kOwners][kTickets];

// The number of a capture, 0 for a stream's own launches, and the number of the stream. Neither is
// used twice in a process.
using Owner = std::pair<unsigned long long, unsigned long long>;

struct Parts {
  std::mutex mutex;
  std::map<unsigned long long, uint32_t*> arrays;  // by context
  std::map<Owner, int> parts;
  std::vector<int> free;
  int unused = 0;  // this part and all after it never had an owner

  int take(const Owner& owner) {
    int part = -1;
    if (!free.empty()) {
      part = free.back();
      free.pop_back();
    } else if (unused < kOwners) {
      part = unused++;
    }
    if (part >= 0) parts[owner] = part;
    return part;
  }
  void give_back(const Owner& owner) {
    const auto found = parts.find(owner);
    if (found == parts.end()) return;
    free.push_back(found->second);
    parts.erase(found);
  }
};

// Never destroyed: graphs may outlive the library's static objects.
Parts& all_parts() {
  static auto* const all = new Parts;
  return *all;
}

bool succeeded(cudaError_t error) {
  if (error != cudaSuccess) (void)cudaGetLastError();
  return error == cudaSuccess;
}

// The array in the current context; nullptr if it is not known. Loading code is not allowed during
// a capture, so a program that captures its very first GEMM gets no tickets for it.
uint32_t* array_of(unsigned long long context, bool capturing) {
  Parts& all = all_parts();
  {
    const std::lock_guard<std::mutex> lock(all.mutex);
    const auto found = all.arrays.find(context);
    if (found != all.arrays.end()) return found->second;
  }
  void* array = nullptr;
  if (capturing || !succeeded(cudaGetSymbolAddress(&array, all_tickets))) return nullptr;
  const std::lock_guard<std::mutex> lock(all.mutex);
  return all.arrays[context] = static_cast<uint32_t*>(array);
}

// Called by the driver when the graph and everything made from it is gone. It must not call CUDA.
void graph_is_gone(void* given) {
  auto* const owner = static_cast<Owner*>(given);
  Parts& all = all_parts();
  const std::lock_guard<std::mutex> lock(all.mutex);
  all.give_back(*owner);
  delete owner;
}

// Whether the graph will tell when it is gone.
bool tie_to_graph(cudaGraph_t graph, const Owner& owner) {
  cudaUserObject_t object = nullptr;
  auto* const copy = new Owner(owner);
  if (!succeeded(
          cudaUserObjectCreate(&object, copy, graph_is_gone, 1, cudaUserObjectNoDestructorSync))) {
    delete copy;
    return false;
  }
  if (succeeded(cudaGraphRetainUserObject(graph, object, 1, cudaGraphUserObjectMove))) return true;
  (void)succeeded(cudaUserObjectRelease(object, 1));  // calls graph_is_gone
  return false;
}

}  // namespace

uint32_t* find_tickets(cudaStream_t stream) {
  unsigned long long context = 0, capture = 0, number = 0;
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  cudaGraph_t graph = nullptr;
  if (!context_id(&context) || !succeeded(cudaStreamGetId(stream, &number)) ||
      !succeeded(cudaStreamGetCaptureInfo(stream, &status, &capture, &graph)) ||
      status == cudaStreamCaptureStatusInvalidated) {
    return nullptr;
  }
  const bool capturing = status == cudaStreamCaptureStatusActive;
  uint32_t* const array = array_of(context, capturing);
  if (array == nullptr) return nullptr;
  const Owner owner = {capturing ? capture : 0, number};
  Parts& all = all_parts();
  int part = -1;
  bool added = false;
  {
    const std::lock_guard<std::mutex> lock(all.mutex);
    const auto found = all.parts.find(owner);
    added = found == all.parts.end();
    part = added ? all.take(owner) : found->second;
  }
  if (part < 0) return nullptr;
  // Without the lock, because the driver may call graph_is_gone at any time.
  if (added && capturing && !tie_to_graph(graph, owner)) return nullptr;
  return array + int64_t{part} * kTickets;
}

}  // namespace sqk
