#include "quantize/instances/instance.cuh"

template sqk::RowKernel sqk::row_kernel_for<sqk::Producer::kRmsNorm>(DType, QuantizePath, Launches,
                                                                     bool);
