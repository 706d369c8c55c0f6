// What the files of the driver share: its entry points stand in libcudart.so.13, too.
#pragma once
#include <cuda.h>

#include "runtime/runtime.h"

// The codes used here are the same in both APIs.
inline CUresult driver_error(int code) { return (CUresult)code; }
