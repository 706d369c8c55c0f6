// An error found while loading or executing PTX.
#pragma once
#include <stdexcept>
#include <string>

namespace ptxsim {
enum ErrorKind {  // the runtime turns each into a cudaError_t
  kErrorLoad,
  kErrorAddress,
  kErrorMisaligned,
  kErrorLaunch,
  kErrorDeadlock,
  kErrorCheck,
  kErrorAssert,
  kErrorTrap
};
struct SimError : std::runtime_error {
  ErrorKind kind;
  int lane;  // -1: not known
  SimError(ErrorKind kind, const std::string& message, int lane = -1)
      : std::runtime_error(message), kind(kind), lane(lane) {}
};
}  // namespace ptxsim
