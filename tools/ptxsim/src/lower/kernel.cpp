// A kernel of a module, lowered.
#include <algorithm>

#include "lower/lowering.h"

namespace ptxsim {
std::string Kernel::where(u32 pc) const {
  std::string s;
  if (pc < code.size()) {
    const Instruction& instruction = code[pc];
    size_t k = labels.size();
    while (k > 0 && labels[k - 1].first > pc) k--;
    s = format("PTX line %u", instruction.line);
    if (k) s += format(" (%s+%u)", labels[k - 1].second.c_str(), pc - labels[k - 1].first);
    if (instruction.source_line) {
      auto f = module->files.find(instruction.source_file);
      s += format(" %s:%u", f == module->files.end() ? "?" : f->second.c_str(),
                  instruction.source_line);
    }
    if (instruction.statement) s += " `" + instruction.statement->text + "`";
  }
  return s;
}

std::unique_ptr<Kernel> lower_kernel(const Module& m, const std::string& name, ModuleData& md,
                                     int cc) {
  auto it = m.functions.find(name);
  if (it == m.functions.end() || !it->second.is_entry || !it->second.has_body)
    throw SimError(kErrorLoad, "no kernel " + name + " in " + m.source);
  auto k = std::make_unique<Kernel>();
  k->name = name;
  k->module = &m;
  k->function = &it->second;
  k->compute_capability = cc;
  // sm_80 and later reserve the first 1024 bytes of shared memory for the system
  k->shared_begin = 1024;
  u32 off = 0;
  Lowering lowering(m, md, *k);
  // Two passes when dynamic shared memory is used: static variables must be laid out first.
  u32 dyn_base = 0;
  bool any_dyn = false;
  u32 dyn_al = 16;
  for (auto& v : m.variables)
    if (v.second.space == kShared && (v.second.unsized_extern || v.second.is_extern)) {
      any_dyn = true;
      dyn_al = std::max(dyn_al, v.second.align);
    }
  for (int pass = 0; pass < (any_dyn ? 2 : 1); pass++) {
    k->code.clear();
    k->labels.clear();
    k->shared_variables.clear();
    k->branch_tables.clear();
    k->local_bytes = 0;
    k->params.clear();
    Lowering P(m, md, *k);
    P.shared_top = k->shared_begin;
    if (any_dyn) {
      for (auto& v : m.variables)
        if (v.second.space == kShared && (v.second.unsized_extern || v.second.is_extern)) {
          Lowering::Location l{kShared, dyn_base, 0};
          P.shared_locations[v.first] = l;
        }
    }
    Lowering::Frame fr;
    off = 0;
    for (auto& p : k->function->params) {
      off = (off + p.align - 1) / p.align * p.align;
      k->params.push_back({off, (u32)p.size});
      fr.variables[p.name] = {kParam, off, p.size};
      off += (u32)p.size;
    }
    k->param_bytes = off;
    P.lower_function(*k->function, fr);
    k->static_shared = P.shared_top - k->shared_begin;
    dyn_base = (P.shared_top + dyn_al - 1) / dyn_al * dyn_al;
    if (pass == (any_dyn ? 1 : 0)) {
      if (any_dyn) k->static_shared = dyn_base - k->shared_begin;
      P.allocate_registers();
    }
  }
  k->local_bytes = (k->local_bytes + 15) / 16 * 16;
  return k;
}
}  // namespace ptxsim
