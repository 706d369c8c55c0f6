// The classes of instructions as the statistics name them.
#include "exec.h"

namespace ptxsim {
const char* const kClsNames[kClasses] = {"int",
                                         "float",
                                         "cvt",
                                         "mov",
                                         "pred",
                                         "ld_global",
                                         "st_global",
                                         "ld_shared",
                                         "st_shared",
                                         "local_param",
                                         "atomic",
                                         "control",
                                         "barrier_fence",
                                         "warp",
                                         "mma",
                                         "wgmma",
                                         "ldmatrix_stmatrix",
                                         "cp_async",
                                         "tma_bulk",
                                         "mbarrier",
                                         "other"};
}  // namespace ptxsim
