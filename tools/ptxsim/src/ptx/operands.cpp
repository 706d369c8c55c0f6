// Operands: registers, special registers, literals, addresses, vectors.
#include <cmath>
#include <cstdlib>

#include "ptx/parser.h"

namespace ptxsim {
bool is_special_reg(const std::string& n) {
  static const char* pre[] = {"%tid",
                              "%ntid",
                              "%laneid",
                              "%warpid",
                              "%nwarpid",
                              "%ctaid",
                              "%nctaid",
                              "%smid",
                              "%nsmid",
                              "%gridid",
                              "%lanemask_",
                              "%clock",
                              "%globaltimer",
                              "%cluster_",
                              "%clusterid",
                              "%nclusterid",
                              "%is_explicit_cluster",
                              "%dynamic_smem_size",
                              "%total_smem_size",
                              "%aggr_smem_size",
                              "%reserved_smem_offset",
                              "%envreg",
                              "%pm",
                              "%current_graph_exec"};
  if (n.empty() || n[0] != '%') return false;
  if (n == "WARP_SZ") return true;
  for (auto p : pre)
    if (n.compare(0, strlen(p), p) == 0) return true;
  return false;
}

i32 Parser::find_register(const std::string& n) {
  for (size_t i = scopes.size(); i-- > 0;) {
    auto& s = scopes[i];
    auto it = s.registers.find(n);
    if (it != s.registers.end()) return it->second;
    size_t k = n.size();
    while (k > 0 && isdigit((unsigned char)n[k - 1])) k--;
    if (k < n.size()) {
      auto r = s.register_ranges.find(n.substr(0, k));
      if (r != s.register_ranges.end()) {
        int idx = atoi(n.c_str() + k);
        if (idx < r->second.second) return r->second.first + idx;
      }
    }
  }
  return -1;
}

std::string Parser::find_variable(const std::string& n) {
  for (size_t i = scopes.size(); i-- > 0;) {
    auto it = scopes[i].variables.find(n);
    if (it != scopes[i].variables.end()) return it->second;
  }
  return n;
}

Operand Parser::operand() {
  Operand o;
  char c = peek();
  if (c == '{') {
    position++;
    o.kind = Operand::kVector;
    if (!accept('}')) {
      do o.elements.push_back(operand());
      while (accept(','));
      expect('}');
    }
    return o;
  }
  if (c == '[') {
    position++;
    o.kind = Operand::kMemory;
    Operand b = operand();
    for (;;) {
      if (accept('+'))
        o.offset += integer_constant();
      else if (peek() == '-') {
        position++;
        o.offset -= integer_constant();
      } else
        break;
    }
    if (b.kind == Operand::kSymbol) {
      o.offset += b.offset;
      b.offset = 0;
    }
    o.elements.push_back(b);
    while (accept(',')) o.elements.push_back(operand());
    expect(']');
    return o;
  }
  if (c == '(') {
    o.kind = Operand::kInteger;
    o.bits = (u64)integer_constant();
    return o;
  }
  if (c == '!') {
    position++;
    o = operand();
    o.negated = !o.negated;
    return o;
  }
  if (c == '-' || c == '+' || isdigit((unsigned char)c)) {
    if (number(o)) {
      if (o.kind == Operand::kInteger)
        while (peek() == '*') {
          position++;
          o.bits *= (u64)integer_constant();
        }
      return o;
    }
    fail("bad number");
  }
  std::string n = identifier();
  if (n == "_") {
    o.kind = Operand::kSink;
    return o;
  }
  if (is_special_reg(n) && find_register(n) < 0) {
    while (position < text.size() && text[position] == '.') {
      position++;
      n += "." + identifier();
    }
    o.kind = Operand::kSpecialRegister;
    o.symbol = n;
    return o;
  }
  if (n == "WARP_SZ") {
    o.kind = Operand::kInteger;
    o.bits = 32;
    return o;
  }
  i32 r = find_register(n);
  if (r >= 0) {
    o.kind = Operand::kRegister;
    o.register_id = r;
    if (position < text.size() && text[position] == '.')
      fail("register component selectors are not supported");
    if (position < text.size() && text[position] == '|') {
      position++;
      Operand q = operand();
      Operand pr;
      pr.kind = Operand::kPair;
      pr.elements = {o, q};
      return pr;
    }
    return o;
  }
  o.kind = Operand::kSymbol;
  o.symbol = find_variable(n);
  size_t sp = position;
  int sl = line;
  if (accept('+')) {
    Operand k;
    if (number(k))
      o.offset = (i64)k.bits;
    else {
      position = sp;
      line = sl;
    }
  }
  return o;
}
}  // namespace ptxsim
