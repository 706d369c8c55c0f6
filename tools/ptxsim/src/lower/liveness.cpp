#include "lower/liveness.h"

#include <algorithm>

namespace ptxsim {
void LiveInterval::include(u32 place) {
  first = std::min(first, place);
  last = std::max(last, place);
}

namespace {
class RegisterSet {
 public:
  explicit RegisterSet(size_t registers) : words((registers + 63) / 64, 0) {}
  bool has(i32 id) const { return words[id / 64] >> (id % 64) & 1; }
  void add(i32 id) { words[id / 64] |= 1ull << (id % 64); }
  void add(const RegisterSet& other) {
    for (size_t i = 0; i < words.size(); i++) words[i] |= other.words[i];
  }
  // Becomes used | (after & ~defined). Returns whether that changes it.
  bool flow(const RegisterSet& used, const RegisterSet& after, const RegisterSet& defined) {
    bool changed = false;
    for (size_t i = 0; i < words.size(); i++) {
      const u64 word = used.words[i] | (after.words[i] & ~defined.words[i]);
      changed |= word != words[i];
      words[i] = word;
    }
    return changed;
  }
  template <class Function>
  void for_each(Function function) const {
    for (size_t i = 0; i < words.size(); i++)
      for (u64 rest = words[i]; rest; rest &= rest - 1)
        function((i32)(i * 64 + __builtin_ctzll(rest)));
  }

 private:
  std::vector<u64> words;
};

// Instructions that run one after the other.
struct Block {
  u32 begin, end;
  std::vector<u32> successors;
  RegisterSet used;     // read before the block defines them
  RegisterSet defined;  // whatever they held before
  RegisterSet live_in, live_out;

  Block(u32 begin, u32 end, size_t registers)
      : begin(begin),
        end(end),
        used(registers),
        defined(registers),
        live_in(registers),
        live_out(registers) {}
};

typedef std::vector<Instruction> Code;

bool ends_block(const Instruction& instruction) {
  return instruction.control == kBranch || instruction.control == kBranchIndexed ||
         instruction.control == kExit;
}

std::vector<u32> branch_targets(const Instruction& instruction) {
  if (instruction.control == kBranch) return {instruction.target};
  if (instruction.control == kBranchIndexed) return *(const std::vector<u32>*)instruction.aux;
  return {};
}

template <class Function>
void for_each_read(const Instruction& instruction, Function function) {
  const int first = instruction.reads_destination ? 0 : instruction.destinations;
  for (int k = first; k < instruction.operand_count; k++)
    if (instruction.operand_ids[k] >= 0) function(instruction.operand_ids[k]);
  if (instruction.predicate >= 0) function(instruction.predicate);
}

template <class Function>
void for_each_written(const Instruction& instruction, Function function) {
  for (int k = 0; k < instruction.destinations; k++)
    if (instruction.operand_ids[k] >= 0) function(instruction.operand_ids[k]);
}

// The pcs where blocks begin, and the end of the code.
std::vector<u32> block_starts(const Code& code) {
  std::vector<bool> starts(code.size() + 1, false);
  starts[0] = starts[code.size()] = true;
  for (size_t pc = 0; pc < code.size(); pc++) {
    if (ends_block(code[pc])) starts[pc + 1] = true;
    for (u32 target : branch_targets(code[pc])) starts[target] = true;
  }
  std::vector<u32> pcs;
  for (size_t pc = 0; pc < starts.size(); pc++)
    if (starts[pc]) pcs.push_back((u32)pc);
  return pcs;
}

// Under a predicate, an instruction may leave its destination as it is, so that the value before
// stays live: it does not define the register.
void find_used_and_defined(const Code& code, Block& block) {
  for (u32 pc = block.begin; pc < block.end; pc++) {
    for_each_read(code[pc], [&](i32 id) {
      if (!block.defined.has(id)) block.used.add(id);
    });
    if (code[pc].predicate < 0) for_each_written(code[pc], [&](i32 id) { block.defined.add(id); });
  }
}

std::vector<Block> make_blocks(const Code& code, size_t registers) {
  const std::vector<u32> starts = block_starts(code);
  std::vector<Block> blocks;
  for (size_t i = 0; i + 1 < starts.size(); i++)
    blocks.emplace_back(starts[i], starts[i + 1], registers);
  for (Block& block : blocks) {
    auto add_successor = [&](u32 pc) {
      if (pc < code.size())
        block.successors.push_back(
            (u32)(std::lower_bound(starts.begin(), starts.end(), pc) - starts.begin()));
    };
    const Instruction& last = code[block.end - 1];
    for (u32 target : branch_targets(last)) add_successor(target);
    if (!ends_block(last) || last.predicate >= 0) add_successor(block.end);
    find_used_and_defined(code, block);
  }
  return blocks;
}

// What is live at the end of a block is live at the beginning of one that may follow it.
void propagate(std::vector<Block>& blocks) {
  for (bool changed = true; changed;) {
    changed = false;
    for (auto block = blocks.rbegin(); block != blocks.rend(); ++block) {
      for (u32 next : block->successors) block->live_out.add(blocks[next].live_in);
      changed |= block->live_in.flow(block->used, block->live_out, block->defined);
    }
  }
}
}  // namespace

std::vector<LiveInterval> live_intervals(const Code& code, size_t registers) {
  std::vector<Block> blocks = make_blocks(code, registers);
  propagate(blocks);
  std::vector<LiveInterval> intervals(registers);
  for (const Block& block : blocks) {
    block.live_in.for_each([&](i32 id) { intervals[id].include(2 * block.begin); });
    block.live_out.for_each([&](i32 id) { intervals[id].include(2 * block.end); });
    for (u32 pc = block.begin; pc < block.end; pc++) {
      for_each_read(code[pc], [&](i32 id) { intervals[id].include(2 * pc); });
      // A destination gets no slot of a source: handlers read and write lane by lane.
      for_each_written(code[pc], [&](i32 id) {
        intervals[id].include(2 * pc);
        intervals[id].include(2 * pc + 1);
      });
    }
  }
  return intervals;
}
}  // namespace ptxsim
