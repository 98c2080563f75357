#include "library.h"

#include <cstring>

namespace ptx {

Device& device() {
  static Device d;
  return d;
}

Library::Library(std::string_view text) : module(parse(text)) {
  // With room around each variable that belongs to nobody, so that an index past one is seen.
  constexpr uint64_t kRoom = 256;
  for (const Variable& v : module.variables) {
    if (v.space == "shared") continue;
    if (v.is_extern || v.size == 0) continue;  // found missing when something uses it
    const uint64_t align = std::max<uint64_t>(v.align, 16);
    auto* bytes = static_cast<uint8_t*>(
        std::aligned_alloc(std::max<uint64_t>(align, kRoom), (v.size + 3 * kRoom) / kRoom * kRoom));
    if (!bytes) throw Error("no memory for '" + v.name + "'");
    storage_.emplace_back(bytes);
    std::memset(bytes, 0, v.size);  // what has no initial value is zero
    std::memcpy(bytes, v.initial.data(), v.initial.size());
    symbols_[v.name] = reinterpret_cast<uint64_t>(bytes);
    device().add(symbols_[v.name], v.size, true, v.name);
  }
  for (const Variable& v : module.variables)
    for (const Variable::Pointer& p : v.pointers) {
      const uint64_t value = symbol(p.symbol) + p.plus;
      std::memcpy(reinterpret_cast<uint8_t*>(symbols_[v.name]) + p.at, &value, 8);
    }
}

Library::~Library() {
  for (const auto& [name, address] : symbols_) device().remove(address);
}

uint64_t Library::symbol(const std::string& name) const {
  const auto found = symbols_.find(name);
  if (found == symbols_.end()) throw Error("the module has no global variable '" + name + "'");
  return found->second;
}

Kernel& Library::kernel(const std::string& name) {
  Kernel& k = kernels_[name];
  if (!k.program) k.program = decode(module, name, symbols_);
  return k;
}

uint64_t static_shared(const Program& p) {
  uint64_t bytes = 0;
  for (const auto& range : p.shared) bytes = (bytes + 15) / 16 * 16 + range.end - range.begin;
  return bytes;
}

void launch(Kernel& k, const uint32_t grid[3], const uint32_t block[3], uint64_t dynamic_shared,
            std::vector<uint8_t> params, const Options& options) {
  const Program& p = *k.program;
  const auto refuse = [&](const std::string& why) { throw Error("'" + p.name + "': " + why); };
  Launch l;
  uint64_t blocks = 1, threads = 1;
  for (int n = 0; n < 3; ++n) {
    l.grid[n] = grid[n], l.block[n] = block[n];
    blocks *= grid[n], threads *= block[n];
    if (blocks > 1u << 22) refuse("a grid of more than 4,194,304 blocks");
    if (threads > 1024) refuse("a block of more than 1024 threads");
  }
  if (blocks == 0 || threads == 0) refuse("a grid or block of size 0");
  if (p.max_threads && threads > static_cast<uint64_t>(p.max_threads))
    refuse("a block of " + std::to_string(threads) + " threads, built for up to " +
           std::to_string(p.max_threads));
  if (p.required_threads && threads != static_cast<uint64_t>(p.required_threads))
    refuse("a block of " + std::to_string(threads) + " threads, built for " +
           std::to_string(p.required_threads));
  if (const uint64_t all = dynamic_shared + static_shared(p); all > kSharedLimit)
    refuse(std::to_string(all) + " bytes of shared memory, a block can have " + std::to_string(kSharedLimit));
  if (params.size() != p.param_bytes)
    refuse(std::to_string(params.size()) + " bytes of parameters, expected " + std::to_string(p.param_bytes));
  l.device = &device();
  l.program = &p;
  l.options = options;
  l.threads = static_cast<uint32_t>(threads);
  l.dynamic_shared = static_cast<uint32_t>(dynamic_shared);
  l.params = std::move(params);
  k.report = {};
  k.report.program = &p;
  k.report.executed.assign(p.code.size(), 0);
  k.report.traffic.assign(p.code.size(), {});
  l.report = &k.report;
  l.run();
}

}  // namespace ptx
