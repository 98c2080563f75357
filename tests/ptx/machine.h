// The state of a launch: blocks, warps, their registers, and what the checks remember of them.
#pragma once

#include <algorithm>
#include <array>
#include <deque>
#include <map>
#include <memory>
#include <random>
#include <vector>

#include "memory.h"
#include "program.h"
#include "report.h"

namespace ptx {

struct alignas(128) Unit {
  uint32_t lane[kLanes];
};

// A function's registers for the lanes that called it together.
struct Frame {
  const Code* code = nullptr;
  Frame* parent = nullptr;
  const Inst* call = nullptr;
  uint32_t return_pc = 0;
  int depth = 0;
  Mask lanes = 0;  // that have not returned yet
  uint64_t local_base = 0;
  std::vector<Unit> values, shadows;  // shadows: undefined bits, valid in the lanes that `undefined` names
  std::vector<Mask> undefined;        // of each slot: lanes with an undefined bit
};

// Lanes that stand at one instruction. A blocked group waits there for lanes that its instruction names; of
// those that have exited none is waited for, unless the instruction needs them all.
struct Group {
  uint32_t pc = 0;
  Mask lanes = 0;
  Frame* frame = nullptr;
  bool blocked = false;
  Mask needed = 0;
  bool needs_exited = false;
};

struct Copy {  // a cp.async that has not landed
  int lane;
  uint64_t group, to, from;
  uint32_t bytes, source_bytes, pc;
  std::array<uint8_t, 16> seen;  // the source when it was issued
};

struct Launch;
struct Block;

struct Warp {
  Launch* launch = nullptr;
  Block* block = nullptr;
  int index = 0;
  uint32_t first_thread = 0;  // number of lane 0 in the grid: block * 1024 + warp * 32
  Mask started = 0, alive = 0;
  enum : uint8_t { kReady, kAtBarrier, kDone } state = kReady;

  // The group that runs, and its frame's registers.
  uint32_t pc = 0;
  Mask active = 0;
  Frame* frame = nullptr;
  Unit* values = nullptr;
  Unit* shadows = nullptr;
  Mask* undefined = nullptr;
  std::vector<Group> others;
  Mask carry = 0;          // CC.CF of each lane
  uint32_t alone_for = 0;  // instructions since another group last ran
  uint32_t pinned = 0;     // instructions that a starved group may still run
  std::deque<Frame> frames;
  std::vector<Frame*> free_frames;

  std::vector<uint8_t> local, local_shadow;  // lane after lane
  uint64_t local_bytes = 0;                  // of a lane

  // Order (race.cpp).
  uint32_t epoch = 0;           // rises whenever this warp's lanes synchronise or publish
  uint32_t synced = 0;          // accesses of this warp's lanes before this epoch are known to all of them
  std::vector<uint32_t> clock;  // accesses of the block's warps before these epochs are known
  std::unique_ptr<LaneOrder> lanes;  // only where a part of the warp synchronised, or through atomics

  std::vector<Copy> copies;  // not landed, in order of issue
  uint64_t copy_groups[kLanes] = {};

  template <class T>
  auto* lane(uint32_t slot) {
    if constexpr (sizeof(T) == 8) {
      return reinterpret_cast<uint64_t*>(values[slot].lane);
    } else {
      return reinterpret_cast<uint32_t*>(values[slot].lane);
    }
  }
  uint64_t value(uint32_t slot, bool wide, int l) {
    return wide ? lane<uint64_t>(slot)[l] : lane<uint32_t>(slot)[l];
  }
  Mask& predicate(uint32_t slot) { return values[slot].lane[0]; }
  // Undefined bits of a lane's value.
  uint64_t shadow(uint32_t slot, bool wide, int l) const {
    if (!(undefined[slot] >> l & 1)) return 0;
    return wide ? reinterpret_cast<const uint64_t*>(shadows[slot].lane)[l] : shadows[slot].lane[l];
  }
  void set_shadow(uint32_t slot, bool wide, int l, uint64_t bits) {
    undefined[slot] = (undefined[slot] & ~(1u << l)) | (bits ? 1u << l : 0);
    if (wide)
      reinterpret_cast<uint64_t*>(shadows[slot].lane)[l] = bits;
    else
      shadows[slot].lane[l] = static_cast<uint32_t>(bits);
  }
  void set_value(uint32_t slot, bool wide, int l, uint64_t bits) {
    if (wide)
      lane<uint64_t>(slot)[l] = bits;
    else
      lane<uint32_t>(slot)[l] = static_cast<uint32_t>(bits);
  }
  uint32_t this_pc() const { return pc - 1; }  // while a handler runs
  const Inst& this_inst() const;

  // warp.cpp
  void enter(const Code& code, Mask lanes, const Inst* call, uint32_t return_pc);
  void leave(Mask lanes);  // ret: to the caller, or out of the kernel
  void exit(Mask lanes);
  void use(Frame* f);
  void branch(Mask taken, uint32_t target);
  // False: exec waits here for the others that the instruction needs.
  bool gather(const Inst& i, Mask exec, Mask needed, bool needs_exited = false);
  bool gather_all(const Inst& i, Mask exec);  // all 32 lanes
  void pick();
  void reconverge();
};

struct Barrier {
  uint32_t arrived = 0, expected = 0;  // threads; expected 0: all of the block
  std::vector<Warp*> waiting;
  std::vector<uint32_t> clock;  // of those that arrived
  std::vector<const Inst*> inst;
  uint32_t count = 0;
  bool all = true, any = false;
};

struct Block {
  Launch* launch = nullptr;
  uint32_t index = 0, at[3] = {};
  std::vector<std::unique_ptr<Warp>> warps;
  Region shared;
  std::vector<uint8_t> pending;  // of shared memory: bytes that a cp.async will write
  size_t pending_copies = 0;
  Barrier barriers[16];
  int running = 0;  // warps that have not ended

  void arrive(Warp& w, const Inst& i, int barrier, uint32_t expected, bool waits);
  void complete_if_full(Barrier& b);
};

struct Options {
  uint64_t seed = 0;  // 0: a warp runs until it must wait; else warps and blocks interleave at random
  int resident = 1;   // blocks at a time
  uint64_t max_warp_instructions = 1ull << 32;
  bool statistics = true;  // banks and sectors
};

struct Launch {
  Device* device = nullptr;
  const Program* program = nullptr;
  Report* report = nullptr;
  Options options;
  uint32_t grid[3] = {1, 1, 1}, block[3] = {1, 1, 1};
  uint32_t threads = 0, dynamic_shared = 0;
  std::vector<uint8_t> params;
  uint64_t executed = 0;
  uint32_t first_epoch = 1, last_epoch = 1;  // records of before are of earlier launches
  bool stopped = false;                      // by an error after which nothing can be believed
  std::mt19937_64 random;
  ReadSets read_sets;
  std::unordered_map<uint64_t, Published> published;  // what atomics and fences hand on, by address

  void run();
};

// Errors that handlers find. The launch goes on unless stop is called.
void report_error(Warp& w, const Inst& i, Mask lanes, const char* kind, std::string message);
void stop(Warp& w, const Inst& i, Mask lanes, const char* kind, std::string message);
std::string lane_names(Mask lanes);
int first_lane(Mask lanes);

// The lanes of an operand that are defined; the others are reported as reaching `what`.
Mask require_defined(Warp& w, const Inst& i, Mask exec, uint32_t slot, const char* what);

// undefined.cpp: marks i.d by i's rule. Before the instruction executes.
void propagate(Warp& w, const Inst& i, Mask exec);

}  // namespace ptx
