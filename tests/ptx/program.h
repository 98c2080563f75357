// A kernel decoded for execution: instructions with their handlers, register slots and constants.
#pragma once

#include <deque>
#include <memory>

#include "syntax.h"

namespace ptx {

constexpr int kLanes = 32;
using Mask = uint32_t;  // a bit for each lane
constexpr Mask kAllLanes = ~0u;

struct Warp;
struct Inst;
// Executes the instruction for the lanes of the mask, which is not empty. Warp::pc names the next
// instruction.
using Handler = void (*)(Warp&, const Inst&, Mask);

// How undefined bits of the sources reach the result (undefined.cpp).
enum class Rule : uint8_t {
  kAll,
  kLogic,
  kAdd,
  kShl,
  kShr,
  kShrSigned,
  kFunnel,
  kPermute,
  kExtract,
  kExtractSigned,
  kInsert,
  kReverse
};

enum class Space : uint8_t { kGeneric, kGlobal, kShared, kLocal, kParam, kConst };

// What few instructions need.
struct Detail {
  Space space = Space::kGeneric;
  int64_t offset = 0, source_offset = 0;
  uint8_t element = 0;     // bytes
  uint8_t count = 1;       // elements of a vector
  bool is_signed = false;  // the loaded value is extended with its sign
  bool is_strong = false, is_acquire = false, is_release = false;
  std::vector<uint32_t> slots, more;  // vector operands; kNoSlot for _
  std::vector<bool> wide;             // the slot holds 64 bits
  std::vector<uint32_t> targets;      // of brx.idx
  const struct Code* callee = nullptr;
};
constexpr uint32_t kNoSlot = ~0u;

// A register is one slot of 32 lanes x 32 bits, one of 64 bits two of them; a predicate is the first word of
// its slot, a bit for each lane. Immediates, addresses of variables and special registers are slots, too,
// written once.
struct Inst {
  Handler run = nullptr;
  uint32_t d = 0, a = 0, b = 0, c = 0;
  int guard = -1;
  bool guard_negated = false;
  bool deleted = false;  // by a test, to see whether it is missed
  bool is_sync = false;  // one that orders memory: a test may delete it
  bool is_block_sync = false;
  Rule rule = Rule::kAll;
  uint8_t bits = 32;                                                    // of the operation
  bool d_wide = false, a_wide = false, b_wide = false, c_wide = false;  // slots of 64 bits
  uint32_t imm = 0;
  const Detail* detail = nullptr;
  int line = 0, source = -1;
};

enum class Constant : uint8_t {
  kBits32,
  kBits64,
  kPred,
  kLocalAddress32,
  kLocalAddress64,
  kTidX,
  kTidY,
  kTidZ,
  kNtidX,
  kNtidY,
  kNtidZ,
  kCtaidX,
  kCtaidY,
  kCtaidZ,
  kNctaidX,
  kNctaidY,
  kNctaidZ,
  kLaneId,
  kWarpId,
  kNumWarps,
  kLaneMaskEq,
  kLaneMaskLe,
  kLaneMaskLt,
  kLaneMaskGe,
  kLaneMaskGt,
  kSmId,
  kNumSms,
  kDynamicShared,
  kTotalShared,
};

struct ConstantSlot {
  Constant kind;
  uint32_t slot;
  uint64_t bits;
};

struct Code {  // of one function
  std::string name;
  uint32_t entry = 0;
  uint32_t register_slots = 0, slots = 0;  // constants follow the registers
  std::vector<ConstantSlot> constants;
  uint64_t local_bytes = 0;
  struct Parameter {
    uint64_t at, size;  // in local memory; of a kernel: in its parameter buffer
  };
  std::vector<Parameter> params, returns;
};

struct Program {  // a kernel and what it calls
  std::string name;
  const Module* module = nullptr;
  std::vector<Inst> code;
  std::deque<Code> functions;  // the kernel first
  std::deque<Detail> details;
  uint64_t param_bytes = 0;
  int max_threads = 0, required_threads = 0;  // of a block; 0: not given
  struct Range {
    uint64_t begin, end;
  };
  std::vector<Range> shared;    // static variables, between them gaps that nothing may touch
  uint64_t dynamic_shared = 0;  // where dynamic shared memory begins
  const Code& function_at(uint32_t pc) const;
  std::string_view text(const Inst& i) const;  // its line in the module
};

// Windows of generic addresses; everything below them is global memory.
constexpr uint64_t kSharedWindow = 1ull << 56, kLocalWindow = 2ull << 56, kParamWindow = 3ull << 56;

using Symbols =
    std::unordered_map<std::string, uint64_t>;  // addresses of a module's global and const variables
std::unique_ptr<Program> decode(const Module& module, const std::string& kernel, const Symbols& symbols);

}  // namespace ptx
