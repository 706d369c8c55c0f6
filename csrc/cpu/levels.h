// The instruction sets that the CPU kernels are compiled for. CPU ring: no torch, no CUDA.
#pragma once

#include <cstdint>

#include "sqk/status.h"

namespace sqk {

// From the slowest to the fastest. A level's code is `level_<name>.cpp`, which alone is compiled
// with its instructions (tools/build/cpu.py).
#define SQK_CPU_LEVELS(X)    \
  X(Portable, portable)      \
  X(Avx2, avx2)              \
  X(AvxVnni, avx_vnni)       \
  X(Avx512Vnni, avx512_vnni) \
  X(Amx, amx)

#define SQK_ENUMERATOR(level, text) k##level,
enum class Level : int32_t { SQK_CPU_LEVELS(SQK_ENUMERATOR) };
#undef SQK_ENUMERATOR
#define SQK_NAME(level, text) #text,
constexpr const char* kLevelNames[] = {SQK_CPU_LEVELS(SQK_NAME)};
#undef SQK_NAME
constexpr int kLevels = sizeof(kLevelNames) / sizeof(kLevelNames[0]);

}  // namespace sqk

// The name of a level: 0 is the slowest; null beyond the last. Never freed.
extern "C" SQK_EXPORT const char* sqk_cpu_level_name(int32_t level);
// Whether this library holds the level and this processor runs it.
extern "C" SQK_EXPORT int32_t sqk_cpu_has_level(int32_t level);
// The level that calls use: the fastest that runs here, unless sqk_cpu_use_level chose another.
extern "C" SQK_EXPORT int32_t sqk_cpu_level();
// Makes later calls use a level, or the fastest for -1. kInvalidArgument, with nothing changed, for
// a level that sqk_cpu_has_level refuses. All levels give the same bits.
extern "C" SQK_EXPORT int32_t sqk_cpu_use_level(int32_t level);
