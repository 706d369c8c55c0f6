// Measures what the predictions assume of a GPU. probe.py compiles and runs it; it needs no torch.
// Each printed line is a JSON object with one member; a section that fails prints the reason.
//   nvcc -std=c++17 -O3 -gencode=arch=compute_90a,code=sm_90a probe.cu -o probe && ./probe
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

namespace {

cudaDeviceProp gpu;

const char* note = nullptr;  // the first failure of the current section

bool ok(cudaError_t error, const char* call) {
  if (error == cudaSuccess) return true;
  (void)cudaGetLastError();
  static char text[300];
  if (note == nullptr) {
    std::snprintf(text, sizeof text, "%s: %s", call, cudaGetErrorString(error));
    note = text;
  }
  return false;
}
#define OK(call) ok(call, #call)

void say(const char* name, double value) {
  std::printf("{\"%s\": %.6g}\n", name, value);
  std::fflush(stdout);
}

double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

// Median milliseconds of some launches, between events.
template <typename Launch>
double milliseconds(int rounds, const Launch& launch, cudaStream_t stream = nullptr) {
  cudaEvent_t begin, end;
  if (!OK(cudaEventCreate(&begin)) || !OK(cudaEventCreate(&end))) return 0;
  std::vector<double> found;
  for (int i = 0; i < rounds + 2; ++i) {
    OK(cudaEventRecord(begin, stream));
    launch();
    OK(cudaEventRecord(end, stream));
    float ms = 0;
    if (!OK(cudaEventSynchronize(end)) || !OK(cudaEventElapsedTime(&ms, begin, end))) return 0;
    if (i >= 2) found.push_back(ms);  // the first ones load the kernel
  }
  OK(cudaEventDestroy(begin));
  OK(cudaEventDestroy(end));
  return median(found);
}

// --- bandwidth and clock ---------------------------------------------------------------------

// Four loads of 16 bytes in flight per thread, past L1.
__global__ void __launch_bounds__(512)
    read_all(const int4* data, int64_t count, int passes, int* out) {
  int sum = 0;
  const int64_t step = int64_t{gridDim.x} * blockDim.x;
  for (int pass = 0; pass < passes; ++pass) {
    int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
    for (; i + 3 * step < count; i += 4 * step) {
      int4 v[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) v[j] = __ldcg(data + i + j * step);
#pragma unroll
      for (int j = 0; j < 4; ++j) sum += v[j].x ^ v[j].y ^ v[j].z ^ v[j].w;
    }
    for (; i < count; i += step) sum += __ldcg(data + i).x;
  }
  if (sum == 0x7fffffff) *out = sum;  // never: keeps the loads
}

void bandwidths(bool small) {
  const int64_t large = small ? 1 << 16 : int64_t{2} << 30;
  const int64_t fits = small ? 1 << 14 : gpu.l2CacheSize / 4;
  int4* data = nullptr;
  int* out = nullptr;
  if (!OK(cudaMalloc(&data, large)) || !OK(cudaMalloc(&out, 4))) return;
  OK(cudaMemset(data, 1, large));
  const int blocks = small ? 2 : 4 * gpu.multiProcessorCount, threads = small ? 32 : 512;
  const int rounds = small ? 1 : 7, passes = small ? 2 : 40;
  double ms =
      milliseconds(rounds, [&] { read_all<<<blocks, threads>>>(data, large / 16, 1, out); });
  OK(cudaGetLastError());
  if (ms > 0) say("dram_read_gb_per_s", large / ms / 1e6);
  ms = milliseconds(rounds, [&] { read_all<<<blocks, threads>>>(data, fits / 16, passes, out); });
  if (ms > 0) say("l2_read_tb_per_s", 1.0 * fits * passes / ms / 1e9);
  ms = milliseconds(rounds, [&] {
    OK(cudaMemcpyAsync(data, data + large / 32, large / 2, cudaMemcpyDeviceToDevice));
  });
  if (ms > 0) say("copy_gb_per_s", large / ms / 1e6);
  OK(cudaFree(data));
  OK(cudaFree(out));
}

__device__ inline uint64_t now_ns() {
  uint64_t ns;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(ns));
  return ns;
}

// One thread follows pointers: clocks of a load that misses L1, or L1 and L2.
__global__ void follow(const int32_t* next, int steps, int64_t* clocks, int* out) {
  int at = 0;
  for (int i = 0; i < 32; ++i) at = __ldcg(next + at);
  const int64_t begin = clock64();
  for (int i = 0; i < steps; ++i) at = __ldcg(next + at);
  *clocks = (clock64() - begin) / steps;
  *out = at;
}

void latencies(bool small) {
  // Steps of 1 MiB and a line touch a new place in memory each time; a small ring stays in L2.
  const auto measure = [&](const char* name, int64_t bytes, int64_t stride) {
    const int64_t count = bytes / 4, jump = stride / 4;
    std::vector<int32_t> next(count, 0);
    int64_t at = 0;
    std::vector<bool> seen(count, false);
    for (;;) {
      seen[at] = true;
      const int64_t to = (at + jump) % count;
      if (seen[to]) break;
      next[at] = static_cast<int32_t>(to);
      at = to;
    }
    int32_t* ring = nullptr;
    int64_t* clocks = nullptr;
    int* out = nullptr;
    if (!OK(cudaMalloc(&ring, bytes)) || !OK(cudaMalloc(&clocks, 8)) || !OK(cudaMalloc(&out, 4))) {
      return;
    }
    OK(cudaMemcpy(ring, next.data(), bytes, cudaMemcpyHostToDevice));
    const int steps = small ? 10 : 1000;
    for (int i = 0; i < 2; ++i) follow<<<1, 1>>>(ring, steps, clocks, out);
    int64_t found = 0;
    OK(cudaMemcpy(&found, clocks, 8, cudaMemcpyDeviceToHost));
    if (found > 0) say(name, static_cast<double>(found));
    OK(cudaFree(ring));
    OK(cudaFree(clocks));
    OK(cudaFree(out));
  };
  measure("l2_latency_clocks", small ? 1 << 12 : 4 << 20, 4096 + 128);
  measure("dram_latency_clocks", small ? 1 << 14 : 1 << 28, small ? 1024 + 128 : (1 << 20) + 128);
}

__global__ void tick(uint64_t ns, double* ghz) {
  const uint64_t begin = now_ns();
  const int64_t clocks = clock64();
  while (now_ns() - begin < ns) {
  }
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    *ghz = static_cast<double>(clock64() - clocks) / static_cast<double>(now_ns() - begin);
  }
}

void clocks(bool small) {
  double* ghz = nullptr;
  double found = 0;
  if (!OK(cudaMalloc(&ghz, 8))) return;
  tick<<<small ? 1 : gpu.multiProcessorCount, 32>>>(small ? 1000 : 20000000, ghz);
  OK(cudaMemcpy(&found, ghz, 8, cudaMemcpyDeviceToHost));
  OK(cudaFree(ghz));
  if (found > 0) say("idle_sm_ghz", found);  // busy, but not with tensor cores
}

// --- blocks on multiprocessors ---------------------------------------------------------------

struct Stay {
  uint64_t begin, end;
  uint32_t sm;
};

__global__ void stay(uint64_t ns, Stay* stays) {
  extern __shared__ char shared[];
  if (threadIdx.x != 0) return;
  const uint64_t begin = now_ns();
  uint32_t sm;
  asm volatile("mov.u32 %0, %smid;" : "=r"(sm));
  while (now_ns() - begin < ns) {
  }
  shared[0] = static_cast<char>(sm);
  stays[blockIdx.x] = {begin, now_ns(), sm};
}

// A launch of `blocks` blocks, with the one attribute that it may have.
struct Config {
  cudaLaunchAttribute attribute = {};
  cudaLaunchConfig_t config = {};

  Config(int blocks, int threads, int64_t shared) {
    config.gridDim = dim3(blocks);
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = shared;
    config.attrs = &attribute;
  }

  void in_clusters(unsigned size) {
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = size;
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    config.numAttrs = 1;
  }
};

// All stays of some blocks, in the order of their numbers.
std::vector<Stay> stays_of(int blocks, int threads, int64_t shared, unsigned cluster, bool small) {
  std::vector<Stay> found(blocks);
  Stay* stays = nullptr;
  if (!OK(cudaMalloc(&stays, blocks * sizeof(Stay)))) return {};
  Config launch(blocks, threads, shared);
  if (cluster > 1) launch.in_clusters(cluster);
  const uint64_t ns = small ? 100 : 200000;
  bool right = OK(cudaFuncSetAttribute(stay, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                       static_cast<int>(shared)));
  right = right && OK(cudaLaunchKernelEx(&launch.config, stay, ns, stays));
  right =
      right && OK(cudaMemcpy(found.data(), stays, blocks * sizeof(Stay), cudaMemcpyDeviceToHost));
  OK(cudaFree(stays));
  if (!right) found.clear();
  return found;
}

int most_together(const std::vector<Stay>& stays) {
  int most = 0;
  for (const Stay& one : stays) {
    int here = 0;
    for (const Stay& other : stays) {
      here += other.sm == one.sm && other.begin <= one.begin && one.begin < other.end;
    }
    most = std::max(most, here);
  }
  return most;
}

// How many blocks with half of the shared memory each run on an SM together, with the default
// carveout and with the largest one requested.
void carveouts(bool small) {
  const int64_t each = gpu.sharedMemPerMultiprocessor / 2 - 1024 - 512;
  const int blocks = small ? 2 : 2 * gpu.multiProcessorCount;
  say("carveout_shared_bytes", static_cast<double>(each));
  for (const bool asked : {false, true}) {
    const int percent = asked ? cudaSharedmemCarveoutMaxShared : cudaSharedmemCarveoutDefault;
    OK(cudaFuncSetAttribute(stay, cudaFuncAttributePreferredSharedMemoryCarveout, percent));
    int fit = 0;
    OK(cudaFuncSetAttribute(stay, cudaFuncAttributeMaxDynamicSharedMemorySize,
                            static_cast<int>(each)));
    if (OK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&fit, stay, 128, each))) {
      say(asked ? "blocks_per_sm_asked_fit" : "blocks_per_sm_default_fit", fit);
    }
    const auto stays = stays_of(blocks, 128, each, 1, small);
    if (!stays.empty()) {
      say(asked ? "blocks_per_sm_asked" : "blocks_per_sm_default", most_together(stays));
    }
  }
}

// Each block takes an SM's whole shared memory, as the wgmma kernels do.
void clusters(bool small) {
  if (gpu.major < 9) return;
  const int shared = static_cast<int>(gpu.sharedMemPerBlockOptin) - 512;
  OK(cudaFuncSetAttribute(stay, cudaFuncAttributeMaxDynamicSharedMemorySize, shared));
  for (const unsigned size : {1u, 2u, 4u, 8u}) {
    Config launch(size * gpu.multiProcessorCount, 384, shared);
    launch.in_clusters(size);
    int most = 0;
    const std::string name = "max_active_clusters_" + std::to_string(size);
    if (OK(cudaOccupancyMaxActiveClusters(&most, stay, &launch.config))) say(name.c_str(), most);
  }
  // The same as observed: SMs on which a grid of pairs ran in its first wave.
  if (small) return;
  const auto stays = stays_of(4 * gpu.multiProcessorCount, 384, shared, 2, small);
  if (stays.empty()) return;
  uint64_t first_end = ~uint64_t{0};
  for (const Stay& one : stays) first_end = std::min(first_end, one.end);
  int first = 0;
  for (const Stay& one : stays) first += one.begin < first_end;
  say("sms_busy_with_pairs", first);
}

// The share of blocks that begin no later than the block one wave after them: 1 is in order.
void order(bool small) {
  const int sms = small ? 2 : gpu.multiProcessorCount;
  const auto stays =
      stays_of(4 * sms, 128, static_cast<int64_t>(gpu.sharedMemPerBlockOptin) - 512, 1, small);
  if (stays.empty()) return;
  int in_order = 0, pairs = 0;
  for (size_t i = 0; i + sms < stays.size(); ++i, ++pairs) {
    in_order += stays[i].begin <= stays[i + sms].begin;
  }
  say("blocks_in_order", 1.0 * in_order / pairs);
}

// --- launches ----------------------------------------------------------------------------------

// Each block stays for a while, then lets the next kernel begin; that waits for all of this one.
__global__ void link_of_chain(int clocks) {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
  asm volatile("griddepcontrol.launch_dependents;");
#endif
  const int64_t begin = clock64();
  while (clock64() - begin < clocks) {
  }
}

// Microseconds for each kernel in a graph of many in a row. 0 where graphs do not work.
double microseconds_in_graph(bool overlap, int clocks, int count) {
  cudaStream_t stream;
  cudaGraph_t graph;
  cudaGraphExec_t ready;
  if (!OK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking))) return 0;
  if (!OK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal))) return 0;
  Config launch(gpu.multiProcessorCount, 128, 0);
  launch.attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  launch.attribute.val.programmaticStreamSerializationAllowed = 1;
  launch.config.stream = stream;
  launch.config.numAttrs = overlap;
  for (int i = 0; i < count; ++i) OK(cudaLaunchKernelEx(&launch.config, link_of_chain, clocks));
  if (!OK(cudaStreamEndCapture(stream, &graph))) return 0;
  if (!OK(cudaGraphInstantiate(&ready, graph, 0))) return 0;
  const double ms = milliseconds(10, [&] { OK(cudaGraphLaunch(ready, stream)); }, stream);
  OK(cudaGraphExecDestroy(ready));
  OK(cudaGraphDestroy(graph));
  OK(cudaStreamDestroy(stream));
  return 1e3 * ms / count;
}

void launches(bool small) {
  const int count = small ? 2 : 200, busy = small ? 10 : 5000;
  const double empty = microseconds_in_graph(false, 0, count);
  if (empty > 0) say("graph_node_us", empty);
  const double apart = microseconds_in_graph(false, busy, count);
  if (apart > 0) say("chain_us", apart);
  if (gpu.major < 9) return;
  const double overlapped = microseconds_in_graph(true, busy, count);
  if (overlapped > 0) say("chain_overlapped_us", overlapped);
}

}  // namespace

// An argument: toy sizes.
int main(int argc, char**) {
  const bool small = argc > 1;
  int device = 0;
  if (!OK(cudaGetDevice(&device)) || !OK(cudaGetDeviceProperties(&gpu, device))) {
    std::fprintf(stderr, "error: %s\n", note);
    return 1;
  }
  say("sms", gpu.multiProcessorCount);
  say("l2_bytes", gpu.l2CacheSize);
  say("shared_bytes_per_sm", static_cast<double>(gpu.sharedMemPerMultiprocessor));
  say("shared_bytes_per_block", static_cast<double>(gpu.sharedMemPerBlockOptin));
  const struct {
    const char* name;
    void (*run)(bool);
  } sections[] = {{"bandwidth", bandwidths}, {"latency", latencies},  {"clock", clocks},
                  {"cluster", clusters},     {"carveout", carveouts}, {"order", order},
                  {"launch", launches}};
  int failed = 0;
  for (const auto& section : sections) {
    note = nullptr;
    section.run(small);
    if (!OK(cudaDeviceSynchronize())) ++failed;
    if (note != nullptr) {
      std::printf("{\"%s_failed\": \"%s\"}\n", section.name, note);
      std::fflush(stdout);
    }
  }
  return failed > 0;
}
