// Memory as the checks see it: what is allocated, which bits are undefined, who touched each word last.
#pragma once

#include <array>
#include <cstdint>
#include <cstdlib>
#include <map>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "program.h"

namespace ptx {

// One access: by whom, when, where in the program. Zero: none.
struct Record {
  uint32_t thread, epoch;
  uint32_t pc : 26, strong : 1;  // strong: atomic, volatile, relaxed, acquire or release
  uint32_t many : 1;             // of reads: by several lanes of the warp
  uint32_t set : 1;              // of reads: by several warps; `thread` is an index into ReadSets
  uint32_t blocks : 1;           // of reads: by several blocks
  uint32_t split : 1;            // of a word's write: `thread` is an index into Region::splits, for each byte
};
struct Cell {
  Record write, read;
};

// The reads of one word by several warps of a block: a record for each.
class ReadSets {
 public:
  void reset(int warps) { warps_ = static_cast<size_t>(warps), records_.clear(), free_.clear(); }
  uint32_t make();
  uint32_t copy(uint32_t from);
  void release(uint32_t set) { free_.push_back(set); }
  Record* at(uint32_t set) { return &records_[set * warps_]; }

 private:
  size_t warps_ = 0;
  std::vector<Record> records_;
  std::vector<uint32_t> free_;
};

// Accesses that are known to have happened: of whole warps before an epoch, and of single threads.
struct Knowledge {
  std::map<uint32_t, uint32_t> warps,
      threads;  // number of the warp's first thread, or of the thread -> epoch
  void join(const Knowledge& other);
  bool has(uint32_t thread, uint32_t epoch) const;
};
struct LaneOrder {
  uint32_t known[kLanes][kLanes] = {};  // lane x knows lane y's accesses before this epoch
  Knowledge acquired[kLanes], pending[kLanes], fenced[kLanes];
  bool has_fenced[kLanes] = {}, fence_is_wide[kLanes] = {};  // wide: reaches other blocks
};
struct Published {
  Knowledge everywhere;
  std::map<uint32_t, Knowledge> in_block;
};

// A piece of memory, with a shadow byte for each byte: its undefined bits.
struct Region {
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  uint64_t begin = 0, end = 0;
  uint8_t* data = nullptr;
  std::unique_ptr<uint8_t, Free> shadow;  // null: all is defined
  std::unique_ptr<Cell, Free> cells;      // null: not touched yet
  std::vector<std::array<Cell, 4>> splits;
  std::vector<uint32_t> free_splits;
  std::string name;
  bool is_shared = false;
  uint32_t first_epoch = 1;  // of shared memory: records before it are another block's
  ReadSets* read_sets = nullptr;

  Cell* cell(uint64_t address);
  uint8_t* shadow_at(uint64_t address) { return shadow ? shadow.get() + (address - begin) : nullptr; }
  void undefine(uint64_t address, uint64_t bytes, bool undefined);
};

// The memory of one device. Addresses are the host's.
class Device {
 public:
  Region& add(uint64_t begin, uint64_t bytes, bool defined, std::string name);
  void remove(uint64_t begin);
  Region* find(uint64_t address);
  std::string nearest(uint64_t address) const;  // for an error
  uint32_t next_epoch = 1;

 private:
  std::map<uint64_t, Region> regions_;
  Region* last_ = nullptr;
};

struct Warp;
struct Place {
  uint8_t* data;
  Region* region;    // null: local memory or parameters
  uint64_t address;  // within the region's space
  uint8_t* shadow;   // may be null
};

// Where an access of one lane goes; reports it and says false where it may not go there.
bool find(Warp& w, const Inst& i, Space space, int lane, uint64_t address, uint32_t bytes, Place& out);

// race.cpp. Called before the access; a write that changes nothing does not race with another write.
void note_read(Warp& w, const Inst& i, int lane, Region& r, uint64_t address, uint32_t bytes, bool strong);
void note_write(Warp& w, const Inst& i, int lane, Region& r, uint64_t address, uint32_t bytes, bool strong,
                const uint8_t* value);
uint64_t sync_key(const Warp& w, const Place& p);  // of a place, for publish and observe
void warp_sync(Warp& w, Mask lanes);
void fence(Warp& w, Mask lanes, bool reaches_other_blocks);
void publish(Warp& w, int lane, uint64_t address, bool replaces);
void observe(Warp& w, int lane, uint64_t address);
void acquire_observed(Warp& w, Mask lanes);

// async.cpp: reports bytes that a cp.async is going to write.
bool is_pending(Warp& w, const Inst& i, int lane, const Region& r, uint64_t address, uint32_t bytes);

}  // namespace ptx
