// Allocation of registers and of the constants of a kernel.
#include <algorithm>

#include "lower/lowering.h"

namespace ptxsim {
// Register allocation: PTX is close to SSA, so thousands of virtual registers are live only
// briefly. A linear scan over live intervals (made valid for loops by a backward data-flow pass)
// keeps a warp's register file in cache.
void Lowering::allocate_registers() {
  auto& code = kernel.code;
  size_t n = code.size(), nv = registers.size();
  if (!n) return;
  // basic blocks
  std::vector<u8> leader(n + 1, 0);
  leader[0] = 1;
  for (size_t i = 0; i < n; i++) {
    auto& I = code[i];
    if (I.control == kBranch) {
      leader[I.target] = 1;
      leader[i + 1] = 1;
    } else if (I.control == kBranchIndexed) {
      for (u32 t : *(const std::vector<u32>*)I.aux) leader[t] = 1;
      leader[i + 1] = 1;
    } else if (I.control == kExit)
      leader[i + 1] = 1;
  }
  std::vector<u32> start;
  std::vector<u32> block_of(n + 1);
  for (size_t i = 0; i < n; i++) {
    if (leader[i]) start.push_back((u32)i);
    block_of[i] = (u32)start.size() - 1;
  }
  block_of[n] = (u32)start.size();
  size_t nb = start.size();
  start.push_back((u32)n);
  // global registers: used in a block other than the one that fully defines them first
  size_t W = (nv + 63) / 64;
  std::vector<std::vector<u64>> gen(nb), kill(nb), in(nb), out(nb);
  auto uses = [&](const Instruction& instruction, auto fn) {
    for (int k = instruction.reads_destination ? 0 : instruction.destinations;
         k < instruction.operand_count; k++)
      if (instruction.operand_ids[k] >= 0) fn(instruction.operand_ids[k]);
    if (instruction.predicate >= 0) fn(instruction.predicate);
  };
  for (size_t b = 0; b < nb; b++) {
    gen[b].assign(W, 0);
    kill[b].assign(W, 0);
    in[b].assign(W, 0);
    out[b].assign(W, 0);
    for (u32 i = start[b]; i < start[b + 1]; i++) {
      auto& I = code[i];
      uses(I, [&](i32 v) {
        if (!(kill[b][v / 64] >> (v % 64) & 1)) gen[b][v / 64] |= 1ull << (v % 64);
      });
      if (I.predicate < 0)
        for (int k = 0; k < I.destinations; k++)
          if (I.operand_ids[k] >= 0) {
            i32 v = I.operand_ids[k];
            kill[b][v / 64] |= 1ull << (v % 64);
          }
    }
  }
  // predicated definitions of a register do not kill, so their live ranges reach back to entry
  // unless defined before: fine.
  std::vector<std::vector<u32>> succ(nb);
  for (size_t b = 0; b < nb; b++) {
    auto& I = code[start[b + 1] - 1];
    auto add = [&](u32 pc) {
      if (pc < n) succ[b].push_back(block_of[pc]);
    };
    if (I.control == kBranch) {
      add(I.target);
      if (I.predicate >= 0) add(start[b + 1]);
    } else if (I.control == kBranchIndexed) {
      for (u32 t : *(const std::vector<u32>*)I.aux) add(t);
      if (I.predicate >= 0) add(start[b + 1]);
    } else if (I.control == kExit) {
      if (I.predicate >= 0) add(start[b + 1]);
    } else
      add(start[b + 1]);
  }
  bool ch = true;
  while (ch) {
    ch = false;
    for (size_t b = nb; b-- > 0;) {
      for (size_t k = 0; k < W; k++) {
        u64 o = 0;
        for (u32 s : succ[b]) o |= in[s][k];
        u64 i2 = gen[b][k] | (o & ~kill[b][k]);
        if (o != out[b][k] || i2 != in[b][k]) {
          out[b][k] = o;
          in[b][k] = i2;
          ch = true;
        }
      }
    }
  }
  std::vector<u32> lo(nv, ~0u), hi(nv, 0);
  auto touch = [&](i32 v, u32 at) {
    if (at < lo[v]) lo[v] = at;
    if (at > hi[v]) hi[v] = at;
  };
  for (size_t b = 0; b < nb; b++) {
    for (size_t k = 0; k < W; k++) {
      for (u64 m = in[b][k]; m; m &= m - 1) touch((i32)(k * 64 + __builtin_ctzll(m)), 2 * start[b]);
      for (u64 m = out[b][k]; m; m &= m - 1)
        touch((i32)(k * 64 + __builtin_ctzll(m)), 2 * start[b + 1]);
    }
    for (u32 i = start[b]; i < start[b + 1]; i++) {
      auto& I = code[i];
      uses(I, [&](i32 v) { touch(v, 2 * i); });
      // destinations may not share a slot with sources: handlers read and write lane by lane across
      // operands
      for (int k = 0; k < I.destinations; k++)
        if (I.operand_ids[k] >= 0)
          touch(I.operand_ids[k], 2 * i), touch(I.operand_ids[k], 2 * i + 1);
    }
  }
  std::vector<i32> order;
  for (size_t v = 0; v < nv; v++)
    if (lo[v] != ~0u) order.push_back((i32)v);
  std::sort(order.begin(), order.end(), [&](i32 a, i32 b) { return lo[a] < lo[b]; });
  std::vector<i32> off(nv, -1);
  u32 top = 0;
  auto bytes_of = [&](i32 v) -> u32 {
    return registers[v].is_predicate ? 64 : 32u * registers[v].slot;
  };
  std::map<u32, std::vector<u32>> free_list;  // size -> offsets
  std::multimap<u32, i32> active;             // end -> vreg
  for (i32 v : order) {
    while (!active.empty() && active.begin()->first < lo[v]) {
      i32 d = active.begin()->second;
      free_list[bytes_of(d)].push_back((u32)off[d]);
      active.erase(active.begin());
    }
    u32 sz = bytes_of(v);
    auto& fl = free_list[sz];
    if (!fl.empty()) {
      off[v] = (i32)fl.back();
      fl.pop_back();
    } else {
      off[v] = (i32)top;
      top += sz;
    }
    active.emplace(hi[v], v);
  }
  kernel.register_bytes = (top + 63) / 64 * 64;
  // constants
  std::vector<u32> coff(constants.size());
  u32 ctop = 0;
  for (size_t i = 0; i < constants.size(); i++) {
    u32 sz = constant_slots[i] ? 32u * constant_slots[i] : 64;
    coff[i] = ctop;
    ctop += sz;
  }
  kernel.constant_storage.assign(ctop + 64, 0);
  u8* cb = (u8*)(((u64)kernel.constant_storage.data() + 63) & ~63ull);
  kernel.constants = cb;
  for (size_t i = 0; i < constants.size(); i++) {
    u8* p = cb + coff[i];
    if (!constant_slots[i]) {
      for (int l = 0; l < 16; l++) ((u32*)p)[l] = (u32)constants[i].first;
      continue;
    }
    for (int l = 0; l < 32; l++) {
      if (constant_slots[i] == 4)
        ((u32*)p)[l] = (u32)constants[i].first;
      else if (constant_slots[i] == 8)
        ((u64*)p)[l] = constants[i].first;
      else {
        ((u64*)p)[2 * l] = constants[i].first;
        ((u64*)p)[2 * l + 1] = constants[i].second;
      }
    }
  }
  size_t tot = 0;
  for (auto& instruction : code) tot += instruction.operand_ids.size();
  kernel.operand_pool.resize(tot);
  size_t q = 0;
  u32 live = 0;
  for (auto& instruction : code) {
    instruction.operands = kernel.operand_pool.data() + q;
    for (i32 id : instruction.operand_ids)
      kernel.operand_pool[q++] = id >= 0 ? (off[id] < 0 ? 0 : off[id]) : ~(i32)coff[-1 - id];
    if (instruction.predicate >= 0) instruction.predicate = off[instruction.predicate];
    instruction.operand_ids.clear();
    instruction.operand_ids.shrink_to_fit();
  }
  (void)live;
  kernel.register_estimate = std::min(255u, top / 128 + 8);
}

}  // namespace ptxsim
