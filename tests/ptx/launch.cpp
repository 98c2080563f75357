// Blocks and warps taking turns.
#include <algorithm>

#include "machine.h"

namespace ptx {

int first_lane(Mask lanes) { return __builtin_ctz(lanes); }

std::string lane_names(Mask lanes) {
  std::string out = __builtin_popcount(lanes) == 1 ? "lane " : "lanes ";
  bool first = true;
  for (int l = 0; l < kLanes; ++l) {
    if (!(lanes >> l & 1)) continue;
    int end = l;
    while (end + 1 < kLanes && (lanes >> (end + 1) & 1)) ++end;
    out += (first ? "" : ",") + std::to_string(l) + (end > l ? "-" + std::to_string(end) : "");
    l = end, first = false;
  }
  return out;
}

void report_error(Warp& w, const Inst& i, Mask lanes, const char* kind, std::string message) {
  const Block& b = *w.block;
  w.launch->report->add({kind,
                         std::move(message),
                         static_cast<uint32_t>(&i - w.launch->program->code.data()),
                         {b.at[0], b.at[1], b.at[2]},
                         w.index,
                         lanes});
}

void stop(Warp& w, const Inst& i, Mask lanes, const char* kind, std::string message) {
  report_error(w, i, lanes, kind, std::move(message));
  w.launch->stopped = true;
}

Mask require_defined(Warp& w, const Inst& i, Mask exec, uint32_t slot, const char* what) {
  const Mask bad = w.undefined[slot] & exec;
  if (bad) report_error(w, i, bad, "undefined data", std::string("undefined data reaches ") + what);
  return exec & ~bad;
}

namespace {

void run_warp(Warp& w, uint64_t turns) {
  Launch& launch = *w.launch;
  const Inst* code = launch.program->code.data();
  uint64_t* executed = launch.report->executed.data();
  while (turns-- && w.state == Warp::kReady && !launch.stopped) {
    if (!w.others.empty()) w.reconverge();
    const Inst& i = code[w.pc];
    if (++launch.executed > launch.options.max_warp_instructions)
      return stop(w, i, w.active, "instruction limit",
                  std::to_string(launch.options.max_warp_instructions) + " warp instructions and no end");
    ++w.pc;
    Mask exec = w.active;
    if (i.guard >= 0) {
      const auto guard = static_cast<uint32_t>(i.guard);
      if (w.undefined[guard] & exec) require_defined(w, i, exec, guard, "a predicate");
      exec &= i.guard_negated ? ~w.predicate(guard) : w.predicate(guard);
      if (!exec) continue;
    }
    ++executed[w.this_pc()];
    if (!i.deleted) i.run(w, i, exec);
  }
}

struct Resident {
  std::unique_ptr<Block> block;
  std::vector<uint8_t> shared;
  ReadSets read_sets;
};

void start(Launch& launch, Resident& r, uint32_t index) {
  if (!r.block) {
    r.block = std::make_unique<Block>();
    r.shared.resize(launch.program->dynamic_shared + launch.dynamic_shared + 16);
    r.block->shared.data = r.shared.data();
    r.block->shared.end = r.shared.size();
    r.block->shared.is_shared = true;
    r.block->shared.name = "shared memory";
    r.block->shared.read_sets = &r.read_sets;
    r.block->pending.assign(r.shared.size(), 0);
  }
  Block& b = *r.block;
  b.launch = &launch;
  b.index = index;
  b.at[0] = index % launch.grid[0];
  b.at[1] = index / launch.grid[0] % launch.grid[1];
  b.at[2] = index / launch.grid[0] / launch.grid[1];
  const int warps = static_cast<int>((launch.threads + kLanes - 1) / kLanes);
  r.read_sets.reset(warps);
  b.shared.undefine(0, r.shared.size(), true);
  // Not zero: a kernel that reads what it did not write must not get away with it.
  std::fill(r.shared.begin(), r.shared.end(), uint8_t{0xcd});
  std::fill(b.pending.begin(), b.pending.end(), uint8_t{0});
  b.pending_copies = 0;
  for (Barrier& barrier : b.barriers) barrier = {};
  b.running = warps;
  b.warps.resize(static_cast<size_t>(warps));
  const uint32_t epoch = b.shared.first_epoch = launch.last_epoch + 1;
  launch.last_epoch = epoch;
  for (int n = 0; n < warps; ++n) {
    auto& slot = b.warps[static_cast<size_t>(n)];
    if (!slot) slot = std::make_unique<Warp>();
    Warp& w = *slot;
    w.launch = &launch, w.block = &b, w.index = n;
    w.first_thread = index * 1024 + 32 * static_cast<uint32_t>(n);
    const uint32_t here = std::min(launch.threads - 32 * static_cast<uint32_t>(n), 32u);
    w.started = w.alive = here == 32 ? kAllLanes : (1u << here) - 1;
    w.state = Warp::kReady;
    w.others.clear();
    w.alone_for = w.pinned = 0;
    w.frames.clear(), w.free_frames.clear();
    w.frame = nullptr;
    w.epoch = epoch;
    w.synced = 0;
    w.clock.assign(static_cast<size_t>(warps), 0);
    w.lanes.reset();
    w.copies.clear();
    std::fill(std::begin(w.copy_groups), std::end(w.copy_groups), 0);
    w.enter(launch.program->functions.front(), w.started, nullptr, 0);
  }
}

// No warp can go on, and some have not ended.
void report_deadlock(Block& b) {
  std::string text;
  Warp* one = nullptr;
  const Inst* at = nullptr;
  for (const auto& w : b.warps)
    if (w->state == Warp::kAtBarrier) {
      const Inst& i = w->this_inst();
      if (!one) one = w.get(), at = &i;
      text += (text.empty() ? "warp " : ", warp ") + std::to_string(w->index) + " waits at PTX line " +
              std::to_string(i.line);
    }
  int ended = 0;
  for (const auto& w : b.warps) ended += w->state == Warp::kDone;
  if (one)
    stop(*one, *at, one->started, "deadlock", text + ", " + std::to_string(ended) + " warps have ended");
}

}  // namespace

void Launch::run() {
  first_epoch = last_epoch = device->next_epoch + 1;
  random.seed(options.seed);
  const uint32_t blocks = grid[0] * grid[1] * grid[2];
  const int warps = static_cast<int>((threads + kLanes - 1) / kLanes);
  read_sets.reset(warps);
  std::vector<Resident> residents(std::min<size_t>(static_cast<size_t>(options.resident), blocks));
  uint32_t next = 0;
  for (Resident& r : residents) start(*this, r, next++);
  size_t live = residents.size(), at_block = 0, at_warp = 0;
  while (live && !stopped) {
    at_block = options.seed ? random() % residents.size() : (at_block + 1) % residents.size();
    if (residents[at_block].block->running == 0) continue;
    Block& b = *residents[at_block].block;
    const size_t first = options.seed ? random() : ++at_warp;
    Warp* chosen = nullptr;
    for (size_t n = 0; n < b.warps.size() && !chosen; ++n) {
      Warp& w = *b.warps[(first + n) % b.warps.size()];
      if (w.state == Warp::kReady) chosen = &w;
    }
    if (!chosen) {
      report_deadlock(b);
      break;
    }
    run_warp(*chosen, options.seed ? 1 + random() % 64 : 5000);
    last_epoch = std::max(last_epoch, chosen->epoch);
    if (chosen->state != Warp::kDone || stopped) continue;
    --b.running;
    for (Barrier& barrier : b.barriers) b.complete_if_full(barrier);
    if (b.running) continue;
    if (next < blocks)
      start(*this, residents[at_block], next++);
    else
      --live;
  }
  device->next_epoch = last_epoch + 1;
  report->warp_instructions += executed;
}

}  // namespace ptx
