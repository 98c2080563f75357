#include "memory.h"

#include <cstring>

#include "machine.h"

namespace ptx {

Cell* Region::cell(uint64_t address) {
  if (!cells) {
    const uint64_t words = ((end + 3) >> 2) - (begin >> 2) + 1;
    cells.reset(static_cast<Cell*>(std::calloc(words, sizeof(Cell))));
    if (!cells) throw Error("no memory for the race records of '" + name + "'");
  }
  return cells.get() + ((address >> 2) - (begin >> 2));
}

void Region::undefine(uint64_t address, uint64_t bytes, bool undefined) {
  if (!shadow && !undefined) return;
  if (!shadow) shadow.reset(static_cast<uint8_t*>(std::calloc(end - begin + 16, 1)));
  if (!shadow) throw Error("no memory for the undefined bits of '" + name + "'");
  std::memset(shadow_at(address), undefined ? 0xff : 0, bytes);
}

Region& Device::add(uint64_t begin, uint64_t bytes, bool defined, std::string name) {
  const uint64_t end = begin + bytes;
  if (begin == 0 || end < begin || end > kSharedWindow)
    throw Error("'" + name + "' is not in a host's address space");
  auto after = regions_.upper_bound(begin);
  if (after != regions_.begin()) {
    const Region& before = std::prev(after)->second;
    // The same memory again, as with a tensor and its view: the larger stands.
    if (before.end >= end && before.begin <= begin) return std::prev(after)->second;
    if (before.begin < begin && before.end > begin)
      throw Error("'" + name + "' and '" + before.name + "' overlap in part");
    if (before.begin == begin) regions_.erase(std::prev(after));
  }
  for (; after != regions_.end() && after->second.begin < end; after = regions_.erase(after))
    if (after->second.end > end)
      throw Error("'" + name + "' and '" + after->second.name + "' overlap in part");
  last_ = nullptr;
  Region& r = regions_[begin];
  r.begin = begin, r.end = end, r.data = reinterpret_cast<uint8_t*>(begin), r.name = std::move(name);
  if (!defined && bytes) r.undefine(begin, bytes, true);
  return r;
}

void Device::remove(uint64_t begin) {
  last_ = nullptr;
  if (!regions_.erase(begin)) throw Error("no allocation begins at this address");
}

Region* Device::find(uint64_t address) {
  if (last_ && last_->begin <= address && address < last_->end) return last_;
  auto after = regions_.upper_bound(address);
  if (after == regions_.begin()) return nullptr;
  Region& r = std::prev(after)->second;
  return address < r.end ? last_ = &r : nullptr;
}

std::string Device::nearest(uint64_t address) const {
  std::string best = "no allocation is near";
  uint64_t distance = 1 << 20;
  for (const auto& [begin, r] : regions_) {
    const uint64_t away = address >= r.end ? address - r.end : address < begin ? begin - address : 0;
    if (away >= distance) continue;
    distance = away;
    best = std::to_string(away) + " bytes " + (address < begin ? "before the beginning" : "behind the end") +
           " of '" + r.name + "' (" + std::to_string(r.end - r.begin) + " bytes)";
  }
  return best;
}

bool find(Warp& w, const Inst& i, Space space, int lane, uint64_t address, uint32_t bytes, Place& out) {
  const Mask mask = 1u << lane;
  if (space == Space::kGeneric) {
    space = address < kSharedWindow  ? Space::kGlobal
            : address < kLocalWindow ? Space::kShared
            : address < kParamWindow ? Space::kLocal
                                     : Space::kParam;
    if (space != Space::kGlobal) address &= kSharedWindow - 1;
  }
  const auto at = [&] {
    char text[40];
    std::snprintf(text, sizeof text, "%s0x%llx",
                  space == Space::kShared  ? "shared "
                  : space == Space::kLocal ? "local "
                  : space == Space::kParam ? "parameter "
                                           : "",
                  static_cast<unsigned long long>(address));
    return std::string(text);
  };
  if (address % bytes) {
    report_error(w, i, mask, "misaligned", "an access of " + std::to_string(bytes) + " bytes at " + at());
    return false;
  }
  const auto outside = [&](const std::string& why) {
    report_error(w, i, mask, "out of bounds",
                 "an access of " + std::to_string(bytes) + " bytes at " + at() + ": " + why);
    return false;
  };
  const auto within = [&](uint64_t begin, uint64_t end) {
    return address >= begin && address <= end && bytes <= end - address;
  };
  Launch& launch = *w.launch;
  out.address = address;
  switch (space) {
    case Space::kShared: {
      Region& r = w.block->shared;
      const Program& p = *launch.program;
      bool inside = within(p.dynamic_shared, p.dynamic_shared + launch.dynamic_shared);
      for (const auto& range : p.shared) inside = inside || within(range.begin, range.end);
      if (!inside)
        return outside("the block has " + std::to_string(launch.dynamic_shared) +
                       " bytes of dynamic shared memory at " + std::to_string(p.dynamic_shared) + " and " +
                       std::to_string(p.shared.size()) + " static arrays");
      out.region = &r, out.data = r.data + address, out.shadow = r.shadow_at(address);
      return true;
    }
    case Space::kLocal: {
      const uint64_t end = w.frame->local_base + w.frame->code->local_bytes;
      if (!within(64, end)) return outside("the stack ends at " + std::to_string(end));
      const uint64_t offset = static_cast<uint64_t>(lane) * w.local_bytes + address;
      out.region = nullptr, out.data = &w.local[offset], out.shadow = &w.local_shadow[offset];
      return true;
    }
    case Space::kParam:
      if (!within(0, launch.params.size()))
        return outside("the kernel has " + std::to_string(launch.params.size()) + " bytes of parameters");
      out.region = nullptr, out.data = &launch.params[address], out.shadow = nullptr;
      return true;
    default: {
      Region* r = launch.device->find(address);
      if (!r || !within(r->begin, r->end)) return outside(launch.device->nearest(address + bytes - 1));
      out.region = r, out.data = r->data + (address - r->begin), out.shadow = r->shadow_at(address);
      return true;
    }
  }
}

}  // namespace ptx
