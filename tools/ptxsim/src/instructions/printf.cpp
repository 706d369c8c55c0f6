// printf and assert of a kernel.
#include <cmath>

#include "checks.h"
#include "exec.h"
#include "instructions/access.h"
#include "instructions/moves.h"
#include "lower/opcodes.h"

namespace ptxsim {
static std::string simulated_printf(Warp& warp, int lane, u64 fmtp, u64 args) {
  auto str = [&](u64 p) {
    std::string s;
    for (;; p++) {
      char c = *(char*)resolve(warp, lane, kGeneric, p, 1, kRead);
      if (!c) break;
      s += c;
      if (s.size() > 4096) break;
    }
    return s;
  };
  std::string f = str(fmtp), out;
  u64 off = 0;
  auto arg = [&](u32 n) {
    off = (off + n - 1) / n * n;
    u64 v = 0;
    memcpy(&v, resolve(warp, lane, kGeneric, args + off, n, kRead), n);
    off += n;
    return v;
  };
  for (size_t i = 0; i < f.size(); i++) {
    if (f[i] != '%') {
      out += f[i];
      continue;
    }
    size_t j = i + 1;
    if (j < f.size() && f[j] == '%') {
      out += '%';
      i = j;
      continue;
    }
    std::string sp = "%";
    int lng = 0;
    while (j < f.size() && !strchr("diouxXeEfFgGaAcsp", f[j])) {
      if (f[j] == 'l' || f[j] == 'j' || f[j] == 'z' || f[j] == 't')
        lng++;
      else if (f[j] == '*')
        sp += std::to_string((i32)arg(4));
      else if (f[j] != 'h')
        sp += f[j];
      j++;
    }
    if (j >= f.size()) break;
    char c = f[j];
    if (strchr("eEfFgGaA", c)) {
      u64 v = arg(8);
      double d;
      memcpy(&d, &v, 8);
      sp += c;
      char b[512];
      snprintf(b, sizeof b, sp.c_str(), d);
      out += b;
    } else if (c == 's') {
      u64 p = arg(8);
      sp += c;
      std::string v = p ? str(p) : "(null)";
      char b[4096];
      snprintf(b, sizeof b, sp.c_str(), v.c_str());
      out += b;
    } else if (c == 'p') {
      char b[64];
      snprintf(b, sizeof b, "0x%llx", (unsigned long long)arg(8));
      out += b;
    } else if (c == 'c') {
      out += (char)arg(4);
    } else {
      u64 v = lng ? arg(8) : arg(4);
      if (!lng && (c == 'd' || c == 'i')) v = (u64)(i64)(i32)v;
      sp += "ll";
      sp += c;
      char b[128];
      snprintf(b, sizeof b, sp.c_str(), (long long)v);
      out += b;
    }
    i = j;
  }
  return out;
}
void execute_vprintf(Warp& warp, const Instruction& instruction, u32 lanes) {
  for_each_lane(lanes, [&](int lane) {
    u64 p0;
    u64 p1;
    memcpy(&p0, local_pointer(warp, lane, warp.source<u64>(instruction.operands[0])[lane], 8), 8);
    memcpy(&p1, local_pointer(warp, lane, warp.source<u64>(instruction.operands[1])[lane], 8), 8);
    std::string s = simulated_printf(warp, lane, p0, p1);
    fputs(s.c_str(), stdout);
    u32 r = (u32)s.size();
    memcpy(local_pointer(warp, lane, warp.source<u64>(instruction.operands[2])[lane], 4), &r, 4);
  });
  fflush(stdout);
}
void execute_assert_fail(Warp& warp, const Instruction& instruction, u32 lanes) {
  int l = __builtin_ctz(lanes);
  if (instruction.imm == 1) warp.fail(kErrorLaunch, l, "device-side malloc/free is not supported");
  auto str = [&](int k) {
    u64 p;
    memcpy(&p, local_pointer(warp, l, warp.source<u64>(instruction.operands[k])[l], 8), 8);
    std::string s;
    for (; p; p++) {
      char c = *(char*)resolve(warp, l, kGeneric, p, 1, kRead);
      if (!c || s.size() > 1000) break;
      s += c;
    }
    return s;
  };
  u32 line;
  memcpy(&line, local_pointer(warp, l, warp.source<u64>(instruction.operands[2])[l], 4), 4);
  warp.fail(kErrorAssert, l,
            format("device assertion failed: %s (%s:%u, %s)", str(0).c_str(), str(1).c_str(), line,
                   str(3).c_str()));
}

}  // namespace ptxsim
