// What a launch found: errors, and counts for each instruction.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "program.h"

namespace ptx {

struct Finding {
  std::string kind, message;  // kinds: see docs/ptx_interpreter.md
  uint32_t pc;
  uint32_t block[3];
  int warp;
  Mask lanes;
  uint64_t times = 1;
};

// Of memory instructions: what a request of the warp cost, and the least that its bytes could cost.
struct Traffic {
  uint64_t requests = 0;
  uint64_t wavefronts = 0, ideal_wavefronts = 0;  // shared memory: passes over the 32 banks
  uint64_t sectors = 0, ideal_sectors = 0;        // global memory: pieces of 32 bytes
};

struct Report {
  const Program* program = nullptr;
  std::vector<Finding> findings;
  std::vector<uint64_t> executed;  // by pc, in warps
  std::vector<Traffic> traffic;
  uint64_t warp_instructions = 0;

  void add(Finding finding);
  std::string json() const;

 private:
  std::unordered_map<std::string, size_t> known_;
};

std::string quoted(std::string_view text);  // as JSON

// Counts one request of a warp: the addresses of the lanes in the mask, each of `bytes`.
void count_shared(Traffic& t, const uint64_t* address, Mask lanes, uint32_t bytes);
void count_global(Traffic& t, const uint64_t* address, Mask lanes, uint32_t bytes);

}  // namespace ptx
