// The statuses that need no CUDA in words. Kernel ring: no torch.
#pragma once

#include "sqk/status.h"

namespace sqk {

// Null for a status that needs more than a constant sentence.
constexpr const char* plain_text(Status status) {
  switch (status) {
    case Status::kSuccess:
      return "success";
    case Status::kInvalidArgument:
      return "an argument is invalid";
    case Status::kUnsupportedShape:
      return "no tile covers this shape";
    case Status::kWorkspaceTooSmall:
      return "the workspace is too small";
    default:
      return nullptr;
  }
}

}  // namespace sqk
