// The threads that a call may use. CPU ring: no torch, no CUDA.
#pragma once

#include <cstdint>

#include "sqk/status.h"

namespace sqk {

using Task = void (*)(void* context, int64_t index);

// Runs tasks in parallel. The CPU kernels take a pointer to one in the place of the stream; null
// runs everything in the calling thread.
struct Threads {
  int64_t count;  // how many tasks can run at once, >= 1
  // Calls task(context, i) for each i in [0, tasks), and returns when all have returned.
  void (*run)(int64_t tasks, Task task, void* context);
};

inline cudaStream_t as_stream(const Threads* threads) {
  return reinterpret_cast<cudaStream_t>(const_cast<Threads*>(threads));
}

// Calls f(i) for each i in [0, tasks).
template <typename F>
void parallel(cudaStream_t stream, int64_t tasks, const F& f) {
  const auto* threads = reinterpret_cast<const Threads*>(stream);
  if (threads == nullptr || threads->count == 1 || tasks == 1) {
    for (int64_t i = 0; i < tasks; ++i) f(i);
    return;
  }
  threads->run(
      tasks, [](void* context, int64_t index) { (*static_cast<const F*>(context))(index); },
      const_cast<F*>(&f));
}

inline int64_t thread_count(cudaStream_t stream) {
  const auto* threads = reinterpret_cast<const Threads*>(stream);
  return threads == nullptr ? 1 : threads->count;
}

}  // namespace sqk
