// The last error of a thread, and the error that stays after a kernel has failed.
#include <cuda_runtime_api.h>

#include <cstdlib>

#include "device/device.h"

namespace ptxsim {
static int g_sticky = 0;
static thread_local int g_last = 0;
static std::string g_message;

int sticky_error() { return g_sticky; }
int note_error(int code) {
  if (code) g_last = code;
  return code;
}
int take_last_error(bool clear) {
  int code = g_last ? g_last : g_sticky;
  if (clear) g_last = 0;
  return code;
}
void reset_errors() {
  g_sticky = 0;
  g_last = 0;
  g_message.clear();
}
const std::string& last_message() { return g_message; }

static int error_code(ErrorKind kind) {
  switch (kind) {
    case kErrorLoad:
      return cudaErrorInvalidKernelImage;
    case kErrorAddress:
      return cudaErrorIllegalAddress;
    case kErrorMisaligned:
      return cudaErrorMisalignedAddress;
    case kErrorDeadlock:
      return cudaErrorLaunchTimeout;
    case kErrorAssert:
      return cudaErrorAssert;
    default:
      return cudaErrorLaunchFailure;
  }
}

int report_error(ErrorKind kind, const std::string& message, bool sticky) {
  int code = error_code(kind);
  g_message = message;
  fprintf(stderr, "ptxsim: %s\n", message.c_str());
  fflush(stderr);
  if (options().abort_on_error) abort();
  if (sticky) g_sticky = code;
  return note_error(code);
}

int refuse_launch(const Kernel& kernel, int code, const std::string& message) {
  g_message = message;
  fprintf(stderr, "ptxsim: launch of %s refused: %s\n", short_name(kernel.name).c_str(),
          message.c_str());
  return note_error(code);
}
}  // namespace ptxsim
