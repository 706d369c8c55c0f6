// printf and assert of a kernel.
#include "fp.h"
#include "instructions/access.h"
#include "instructions/moves.h"

namespace ptxsim {
static std::string device_string(Warp& warp, int lane, u64 address, size_t limit) {
  std::string text;
  for (; text.size() <= limit; address++) {
    char c = *(char*)resolve(warp, lane, kGeneric, address, 1, kRead);
    if (!c) break;
    text += c;
  }
  return text;
}

namespace {
// One call of printf by a lane.
struct Printf {
  Warp& warp;
  int lane;
  u64 arguments;  // their address
  u64 offset = 0;
  std::string out = {};

  u64 argument(u32 bytes);
  size_t conversion(const std::string& format, size_t begin);
  void convert(std::string spec, char kind, bool is_long);
  template <size_t kBytes = 512, class T>
  void append(const std::string& spec, T value) {
    char text[kBytes];
    snprintf(text, sizeof text, spec.c_str(), value);
    out += text;
  }
};
}  // namespace

u64 Printf::argument(u32 bytes) {
  offset = (offset + bytes - 1) / bytes * bytes;
  u64 value = 0;
  memcpy(&value, resolve(warp, lane, kGeneric, arguments + offset, bytes, kRead), bytes);
  offset += bytes;
  return value;
}

// Appends one argument; spec: %, flags, width and precision.
void Printf::convert(std::string spec, char kind, bool is_long) {
  if (strchr("eEfFgGaA", kind)) {
    append(spec + kind, bits_to<double>(argument(8)));
  } else if (kind == 's') {
    u64 address = argument(8);
    std::string text = address ? device_string(warp, lane, address, 4096) : "(null)";
    append<4096>(spec + kind, text.c_str());
  } else if (kind == 'p') {
    append("0x%llx", (unsigned long long)argument(8));
  } else if (kind == 'c') {
    out += (char)argument(4);
  } else {
    u64 value = argument(is_long ? 8 : 4);
    if (!is_long && (kind == 'd' || kind == 'i')) value = (u64)(i64)(i32)value;
    append<128>(spec + "ll" + kind, (long long)value);
  }
}

// Appends the conversion whose % is at `begin`; returns where the format goes on.
size_t Printf::conversion(const std::string& format, size_t begin) {
  size_t at = begin + 1;
  if (at < format.size() && format[at] == '%') {
    out += '%';
    return at + 1;
  }
  std::string spec = "%";
  bool is_long = false;
  for (; at < format.size() && !strchr("diouxXeEfFgGaAcsp", format[at]); at++) {
    char c = format[at];
    if (strchr("ljzt", c))
      is_long = true;
    else if (c == '*')
      spec += std::to_string((i32)argument(4));
    else if (c != 'h')
      spec += c;
  }
  if (at >= format.size()) return at;
  convert(spec, format[at], is_long);
  return at + 1;
}

static std::string simulated_printf(Warp& warp, int lane, u64 format_address, u64 arguments) {
  std::string format = device_string(warp, lane, format_address, 4096);
  Printf call{warp, lane, arguments};
  for (size_t at = 0; at < format.size();) {
    if (format[at] == '%')
      at = call.conversion(format, at);
    else
      call.out += format[at++];
  }
  return call.out;
}

// An argument of a call: the operand is its address in local memory.
template <class T>
static T call_argument(Warp& warp, const Instruction& instruction, int k, int lane) {
  T value;
  u64 address = warp.source<u64>(instruction.operands[k])[lane];
  memcpy(&value, local_pointer(warp, lane, address, sizeof value), sizeof value);
  return value;
}

void execute_vprintf(Warp& warp, const Instruction& instruction, u32 lanes) {
  for_each_lane(lanes, [&](int lane) {
    u64 format = call_argument<u64>(warp, instruction, 0, lane);
    u64 arguments = call_argument<u64>(warp, instruction, 1, lane);
    std::string text = simulated_printf(warp, lane, format, arguments);
    fputs(text.c_str(), stdout);
    u32 length = (u32)text.size();
    u64 result = warp.source<u64>(instruction.operands[2])[lane];
    memcpy(local_pointer(warp, lane, result, 4), &length, 4);
  });
  fflush(stdout);
}
void execute_assert_fail(Warp& warp, const Instruction& instruction, u32 lanes) {
  int lane = __builtin_ctz(lanes);
  if (instruction.imm == 1)
    warp.fail(kErrorLaunch, lane, "device-side malloc/free is not supported");
  auto text = [&](int k) {
    u64 address = call_argument<u64>(warp, instruction, k, lane);
    return address ? device_string(warp, lane, address, 1000) : std::string();
  };
  u32 line = call_argument<u32>(warp, instruction, 2, lane);
  warp.fail(kErrorAssert, lane,
            format("device assertion failed: %s (%s:%u, %s)", text(0).c_str(), text(1).c_str(),
                   line, text(3).c_str()));
}
}  // namespace ptxsim
