// Which instruction sets this processor has, and which one is in use. CPU ring: no torch, no CUDA.
#include "cpu/levels.h"

#include <algorithm>
#include <atomic>

#include "common/status_text.h"
#include "cpu/kernels.h"

#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if defined(__x86_64__)
#include <cpuid.h>
#endif

// The build says which levels it has compiled.
#ifndef SQK_CPU_HAS_AVX2
#define SQK_CPU_HAS_AVX2 0
#endif
#ifndef SQK_CPU_HAS_AVX_VNNI
#define SQK_CPU_HAS_AVX_VNNI 0
#endif
#ifndef SQK_CPU_HAS_AVX512_VNNI
#define SQK_CPU_HAS_AVX512_VNNI 0
#endif
#ifndef SQK_CPU_HAS_AMX
#define SQK_CPU_HAS_AMX 0
#endif

namespace sqk {
namespace {

// A level's kernels, or null if they were not compiled.
const Kernels* compiled(int32_t level) {
  switch (static_cast<Level>(level)) {
    case Level::kPortable:
      return &kKernelsPortable;
#if SQK_CPU_HAS_AVX2
    case Level::kAvx2:
      return &kKernelsAvx2;
#endif
#if SQK_CPU_HAS_AVX_VNNI
    case Level::kAvxVnni:
      return &kKernelsAvxVnni;
#endif
#if SQK_CPU_HAS_AVX512_VNNI
    case Level::kAvx512Vnni:
      return &kKernelsAvx512Vnni;
#endif
#if SQK_CPU_HAS_AMX
    case Level::kAmx:
      return &kKernelsAmx;
#endif
    default:
      return nullptr;
  }
}

#if defined(__x86_64__)

struct Registers {
  uint32_t a = 0, b = 0, c = 0, d = 0;
};

Registers cpuid(uint32_t leaf, uint32_t part) {
  Registers found;
  __get_cpuid_count(leaf, part, &found.a, &found.b, &found.c, &found.d);
  return found;
}

bool has_bit(uint32_t bits, int bit) { return (bits >> bit & 1) != 0; }

// The registers that the operating system saves, as bits of XCR0.
uint64_t saved_state() {
  if (!has_bit(cpuid(1, 0).c, 27)) return 0;
  uint32_t low, high;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return uint64_t{high} << 32 | low;
}

// Linux gives a process the tile registers only if it asks.
bool may_use_tiles() {
#if defined(__linux__)
  constexpr long kRequest = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
#else
  return false;
#endif
}

bool runs(Level level) {
  constexpr uint64_t kYmm = 0x6, kZmm = 0xe6, kTiles = 0x60000;
  const uint64_t saved = saved_state();
  const Registers basic = cpuid(1, 0), more = cpuid(7, 0), newer = cpuid(7, 1);
  const auto saves = [&](uint64_t state) { return (saved & state) == state; };
  const bool avx2 =
      saves(kYmm) && has_bit(basic.c, 12) && has_bit(basic.c, 29) && has_bit(more.b, 5);
  // F, DQ, BW, VL, VNNI
  const bool avx512 = avx2 && saves(kZmm) && has_bit(more.b, 16) && has_bit(more.b, 17) &&
                      has_bit(more.b, 30) && has_bit(more.b, 31) && has_bit(more.c, 11);
  switch (level) {
    case Level::kPortable:
      return true;
    case Level::kAvx2:
      return avx2;
    case Level::kAvxVnni:
      return avx2 && has_bit(newer.a, 4);
    case Level::kAvx512Vnni:
      return avx512;
    case Level::kAmx:
      return avx512 && saves(kTiles) && has_bit(more.d, 24) && has_bit(more.d, 25) &&
             may_use_tiles();
  }
  return false;
}

#else

bool runs(Level level) { return level == Level::kPortable; }

#endif

bool has(int32_t level) {
  static const uint32_t found = [] {
    uint32_t bits = 0;
    for (int32_t i = 0; i < kLevels; ++i) {
      if (compiled(i) != nullptr && runs(static_cast<Level>(i))) bits |= 1u << i;
    }
    return bits;
  }();
  return level >= 0 && level < kLevels && (found >> level & 1) != 0;
}

int32_t fastest() {
  int32_t level = kLevels - 1;
  while (!has(level)) --level;
  return level;
}

std::atomic<int32_t>& level_in_use() {
  static std::atomic<int32_t> level{fastest()};
  return level;
}

}  // namespace

int64_t l2_bytes() {
  static const int64_t found = [] {
    constexpr int64_t kLeast = 512 << 10, kMost = 2 << 20;
#if defined(_SC_LEVEL2_CACHE_SIZE)
    return std::clamp<int64_t>(sysconf(_SC_LEVEL2_CACHE_SIZE), kLeast, kMost);
#else
    return kLeast;
#endif
  }();
  return found;
}

const Kernels* kernels_of(int32_t level) { return has(level) ? compiled(level) : nullptr; }

const Kernels& kernels() { return *compiled(level_in_use().load(std::memory_order_relaxed)); }

const char* describe(Status status) {
  const char* plain = plain_text(status);
  return plain != nullptr ? plain : "unknown status";
}

}  // namespace sqk

extern "C" const char* sqk_cpu_level_name(int32_t level) {
  return level >= 0 && level < sqk::kLevels ? sqk::kLevelNames[level] : nullptr;
}

extern "C" int32_t sqk_cpu_has_level(int32_t level) { return sqk::has(level) ? 1 : 0; }

extern "C" int32_t sqk_cpu_level() { return sqk::level_in_use().load(std::memory_order_relaxed); }

extern "C" int32_t sqk_cpu_use_level(int32_t level) {
  if (level != -1 && !sqk::has(level)) return static_cast<int32_t>(sqk::Status::kInvalidArgument);
  sqk::level_in_use().store(level == -1 ? sqk::fastest() : level, std::memory_order_relaxed);
  return static_cast<int32_t>(sqk::Status::kSuccess);
}
