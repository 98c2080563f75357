// Happens-before, as in FastTrack (Flanagan and Freund, PLDI 2009): every word remembers its last write and
// the reads since; an access that is not ordered behind them is a race. Order comes from program order of one
// lane, from bar.warp.sync between the lanes that it names, from barriers between warps, and from a fence
// followed by an atomic (or volatile or relaxed access) that another thread's access to the same address,
// followed by a fence, observes.
#include <cstring>

#include "machine.h"

namespace ptx {

uint32_t ReadSets::make() {
  if (free_.empty()) {
    free_.push_back(static_cast<uint32_t>(records_.size() / warps_));
    records_.resize(records_.size() + warps_);
  }
  const uint32_t set = free_.back();
  free_.pop_back();
  std::memset(static_cast<void*>(at(set)), 0, warps_ * sizeof(Record));
  return set;
}

uint32_t ReadSets::copy(uint32_t from) {
  const uint32_t to = make();
  std::memcpy(static_cast<void*>(at(to)), at(from), warps_ * sizeof(Record));
  return to;
}

void Knowledge::join(const Knowledge& other) {
  for (const auto& [from, to] : {std::pair(&other.warps, &warps), std::pair(&other.threads, &threads)})
    for (const auto& [key, epoch] : *from) {
      uint32_t& mine = (*to)[key];
      mine = std::max(mine, epoch);
    }
}

bool Knowledge::has(uint32_t thread, uint32_t epoch) const {
  const auto w = warps.find(thread & ~31u);
  if (w != warps.end() && epoch < w->second) return true;
  const auto t = threads.find(thread);
  return t != threads.end() && epoch < t->second;
}

namespace {

enum { kBlockShift = 10 };  // thread numbers: block * 1024 + thread

struct Toucher {
  Warp& w;
  const Inst& i;
  Region& r;
  int lane;
  uint32_t thread;
  bool strong;

  ReadSets& sets() const { return r.is_shared ? *r.read_sets : w.launch->read_sets; }

  bool counts(const Record& x) const {
    return x.epoch >= (r.is_shared ? r.first_epoch : w.launch->first_epoch);
  }

  bool ordered(const Record& x) const {
    if (x.thread == thread && !x.many) return true;
    if (x.thread >> 5 == thread >> 5) {
      if (x.epoch < w.synced) return true;
      if (!w.lanes) return false;
      if (!x.many) return x.epoch < w.lanes->known[lane][x.thread & 31];
      for (int y = 0; y < kLanes; ++y)  // which lanes is not remembered
        if (y != lane && x.epoch >= w.lanes->known[lane][y]) return false;
      return true;
    }
    if (x.thread >> kBlockShift == thread >> kBlockShift && x.epoch < w.clock[x.thread >> 5 & 31])
      return true;
    return w.lanes && !x.many && w.lanes->acquired[lane].has(x.thread, x.epoch);
  }

  void race(const Record& other, const char* mine, const char* theirs) const {
    const Inst& o = w.launch->program->code[other.pc];
    const Program& p = *w.launch->program;
    std::string text = std::string(mine) + " after an unordered " + theirs + " by ";
    if (other.thread >> kBlockShift != thread >> kBlockShift)
      text += "block " + std::to_string(other.thread >> kBlockShift) + ", ";
    text += "warp " + std::to_string(other.thread >> 5 & 31);
    text += other.many ? ", several lanes" : ", lane " + std::to_string(other.thread & 31);
    text += ": " + std::string(p.text(o)) + " (PTX line " + std::to_string(o.line);
    if (o.source >= 0) text += ", " + p.module->sources[static_cast<size_t>(o.source)];
    report_error(w, i, 1u << lane, r.is_shared ? "shared race" : "global race", text + ")");
  }

  Record now() const {
    Record x = {};
    x.thread = thread, x.epoch = w.epoch, x.strong = strong;
    x.pc = static_cast<uint32_t>(&i - w.launch->program->code.data());
    return x;
  }

  void read(Cell& c) const {
    const Record& last = c.write;
    if (counts(last) && !(strong && last.strong) && !ordered(last)) race(last, "a read", "write");
    Record& x = c.read;
    if (x.thread == thread && x.epoch == w.epoch && !x.set) return;
    if (!counts(x)) {
      x = now();
    } else if (x.blocks) {
      x.epoch = w.epoch;
    } else if (x.set) {
      Record* set = sets().at(x.thread);
      if (const uint32_t* other = someone(set); *other >> kBlockShift != thread >> kBlockShift) {
        sets().release(x.thread);
        x = now();
        x.blocks = 1;
        return;
      }
      add(set[w.index]);
      if (x.epoch >= w.synced) return;
      x.epoch = w.epoch;
      bool all_known = !set[w.index].many;  // then this read stands for them all
      for (size_t v = 0; v < w.block->warps.size() && all_known; ++v)
        all_known = static_cast<int>(v) == w.index || !set[v].epoch || ordered(set[v]);
      if (all_known) {
        sets().release(x.thread);
        x = now();
      }
    } else if (x.thread >> 5 == thread >> 5) {
      add(x);
    } else if (ordered(x)) {
      x = now();
    } else if (x.thread >> kBlockShift != thread >> kBlockShift) {
      x = now();
      x.blocks = 1;
    } else {
      const uint32_t set = sets().make();
      sets().at(set)[x.thread >> 5 & 31] = x;
      sets().at(set)[w.index] = now();
      x.thread = set, x.set = 1, x.epoch = w.epoch;
    }
  }

  const uint32_t* someone(const Record* set) const {
    while (!set->epoch) ++set;
    return &set->thread;
  }

  // This lane's read joins those of its warp.
  void add(Record& x) const {
    if (!counts(x) || x.thread >> 5 != thread >> 5 || ordered(x)) {
      x = now();
    } else if (x.thread != thread || x.many) {
      x.many = 1, x.epoch = w.epoch;
    }
  }

  void write(Cell& c, bool changes) const {
    const Record& last = c.write;
    if (changes && counts(last) && !(strong && last.strong) && !ordered(last)) race(last, "a write", "write");
    const Record x = c.read;
    if (counts(x)) {
      const auto check = [&](const Record& read) {
        if (!(strong && read.strong) && !ordered(read)) race(read, "a write", "read");
      };
      if (x.blocks) {
        race(x, "a write", "read");
      } else if (x.set) {
        const Record* set = sets().at(x.thread);
        for (size_t v = 0; v < w.block->warps.size(); ++v)
          if (counts(set[v])) check(set[v]);
        sets().release(x.thread);
      } else {
        check(x);
      }
    }
    c.write = now();
    c.read = {};
  }

  // Whole words, or the bytes of a word that has been touched in parts.
  template <class F>
  void each(uint64_t address, uint32_t bytes, bool writes, F touch) const {
    Cell* c = r.cell(address);
    if (bytes >= 4) {
      for (uint32_t n = 0; n < bytes; n += 4, ++c) {
        if (!c->write.split) {
          touch(*c, n, 4u);
          continue;
        }
        const uint32_t split = c->write.thread;
        for (uint32_t k = 0; k < 4; ++k) touch(r.splits[split][k], n + k, 1u);
        if (writes) *c = r.splits[split][0], r.free_splits.push_back(split);
      }
      return;
    }
    if (!c->write.split) {
      if (r.free_splits.empty()) {
        r.free_splits.push_back(static_cast<uint32_t>(r.splits.size()));
        r.splits.emplace_back();
      }
      const uint32_t split = r.free_splits.back();
      r.free_splits.pop_back();
      r.splits[split].fill(*c);
      if (counts(c->read) && c->read.set)
        for (uint32_t k = 1; k < 4; ++k) r.splits[split][k].read.thread = sets().copy(c->read.thread);
      c->write.split = 1, c->write.thread = split;
    }
    for (uint32_t k = 0; k < bytes; ++k) touch(r.splits[c->write.thread][(address & 3) + k], k, 1u);
  }
};

}  // namespace

void note_read(Warp& w, const Inst& i, int lane, Region& r, uint64_t address, uint32_t bytes, bool strong) {
  const Toucher t = {w, i, r, lane, w.first_thread + static_cast<uint32_t>(lane), strong};
  t.each(address, bytes, false, [&](Cell& c, uint32_t, uint32_t) { t.read(c); });
}

void note_write(Warp& w, const Inst& i, int lane, Region& r, uint64_t address, uint32_t bytes, bool strong,
                const uint8_t* value) {
  const Toucher t = {w, i, r, lane, w.first_thread + static_cast<uint32_t>(lane), strong};
  const uint8_t* old = r.data + (address - r.begin);
  t.each(address, bytes, true, [&](Cell& c, uint32_t n, uint32_t size) {
    t.write(c, !value || std::memcmp(old + n, value + n, size));
  });
}

// Shared memory's addresses are each block's own; blocks may have windows that no address reaches.
uint64_t sync_key(const Warp& w, const Place& p) {
  return p.region->is_shared ? p.address + kSharedWindow + (static_cast<uint64_t>(w.block->index) << 24)
                             : p.address;
}

void warp_sync(Warp& w, Mask lanes) {
  const bool all = lanes == w.started;
  if (w.lanes) {
    LaneOrder& o = *w.lanes;
    uint32_t known[kLanes] = {};
    Knowledge acquired;
    for (int x = 0; x < kLanes; ++x) {
      if (!(lanes >> x & 1)) continue;
      acquired.join(o.acquired[x]);
      for (int y = 0; y < kLanes; ++y) known[y] = std::max(known[y], o.known[x][y]);
    }
    for (int x = 0; x < kLanes; ++x) {
      if (!(lanes >> x & 1)) continue;
      o.acquired[x] = acquired;
      for (int y = 0; y < kLanes; ++y) o.known[x][y] = lanes >> y & 1 ? w.epoch + 1 : known[y];
    }
  } else if (!all) {
    w.lanes = std::make_unique<LaneOrder>();
    return warp_sync(w, lanes);
  }
  ++w.epoch;
  if (all) w.synced = w.epoch;
}

void fence(Warp& w, Mask lanes, bool reaches_other_blocks) {
  if (!w.lanes) w.lanes = std::make_unique<LaneOrder>();
  acquire_observed(w, lanes);
  LaneOrder& o = *w.lanes;
  for (int x = 0; x < kLanes; ++x) {
    if (!(lanes >> x & 1)) continue;
    Knowledge k = o.acquired[x];
    for (size_t v = 0; v < w.clock.size(); ++v)
      k.warps[(w.first_thread & ~1023u) + 32 * static_cast<uint32_t>(v)] = w.clock[v];
    k.warps[w.first_thread] = w.synced;
    for (uint32_t y = 0; y < kLanes; ++y)
      if (o.known[x][y] > w.synced) k.threads[w.first_thread + y] = o.known[x][y];
    k.threads[w.first_thread + static_cast<uint32_t>(x)] = w.epoch + 1;
    o.fenced[x] = std::move(k);
    o.has_fenced[x] = true, o.fence_is_wide[x] = reaches_other_blocks;
  }
  ++w.epoch;
}

void publish(Warp& w, int lane, uint64_t address, bool replaces) {
  if (!w.lanes || !w.lanes->has_fenced[lane]) return;
  Published& p = w.launch->published[address];
  if (replaces) p = {};
  const Knowledge& k = w.lanes->fenced[lane];
  (w.lanes->fence_is_wide[lane] ? p.everywhere : p.in_block[w.block->index]).join(k);
}

void observe(Warp& w, int lane, uint64_t address) {
  const auto p = w.launch->published.find(address);
  if (p == w.launch->published.end()) return;
  if (!w.lanes) w.lanes = std::make_unique<LaneOrder>();
  w.lanes->pending[lane].join(p->second.everywhere);
  const auto own = p->second.in_block.find(w.block->index);
  if (own != p->second.in_block.end()) w.lanes->pending[lane].join(own->second);
}

void acquire_observed(Warp& w, Mask lanes) {
  if (!w.lanes) return;
  for (int x = 0; x < kLanes; ++x)
    if (lanes >> x & 1) w.lanes->acquired[x].join(w.lanes->pending[x]), w.lanes->pending[x] = {};
}

}  // namespace ptx
