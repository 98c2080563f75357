// What loads, stores, atomics and copies share.
#pragma once

#include "lanes.h"

namespace ptx {

// The lanes of an instruction that may access memory, and where. Reports those that may not.
struct Access {
  Warp& w;
  const Inst& i;
  uint32_t bytes;
  Mask lanes = 0, shared = 0, global = 0;
  Place place[kLanes];
  uint64_t address[kLanes];

  Access(Warp& w, const Inst& i, Mask exec, uint32_t bytes);
  ~Access();  // counts banks and sectors
};

uint64_t effective_address(Warp& w, const Inst& i, int lane);
void copy_in(Place& p, const uint8_t* value, const uint8_t* shadow, uint32_t bytes);
void copy_out(const Place& p, uint8_t* value, uint8_t* shadow, uint32_t bytes);

// .weak, .relaxed.gpu, .volatile, .ca, .L1::no_allocate, .L2::cache_hint and the like: only the strength
// matters here. Takes the operand of a cache hint into account and returns how many operands there are
// without it.
size_t decode_memory_modifiers(Decoder& d);
Space decode_space(Decoder& d);

}  // namespace ptx
