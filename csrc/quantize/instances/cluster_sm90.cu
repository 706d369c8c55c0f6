// The row kernels with thread block clusters, of every producer. Kernel ring: no torch.
#include <utility>

#include "quantize/kernels.h"

namespace sqk {
namespace {

template <int... kProducer>
RowKernel find_kernel(Producer producer, DType dtype, std::integer_sequence<int, kProducer...>) {
  using Find = RowKernel (*)(DType, bool);
  static constexpr Find kFind[] = {&row_kernel_of_type<static_cast<Producer>(kProducer),
                                                       QuantizePath::kCluster, Launches::kOne>...};
  return kFind[static_cast<int>(producer)](dtype, true);
}

}  // namespace

RowKernel cluster_kernel_for(Producer producer, DType dtype) {
  return find_kernel(producer, dtype, std::make_integer_sequence<int, kProducers>());
}

}  // namespace sqk
