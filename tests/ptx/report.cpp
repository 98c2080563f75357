#include "report.h"

#include <algorithm>
#include <cstdio>

namespace ptx {

void Report::add(Finding finding) {
  const auto [known, is_new] = known_.try_emplace(finding.kind + std::to_string(finding.pc), findings.size());
  if (is_new)
    findings.push_back(std::move(finding));
  else
    ++findings[known->second].times;
}

std::string quoted(std::string_view text) {
  std::string out = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') {
      out += '\\', out += c;
    } else if (static_cast<unsigned char>(c) < 0x20) {
      char escape[8];
      std::snprintf(escape, sizeof escape, "\\u%04x", c);
      out += escape;
    } else {
      out += c;
    }
  }
  return out + '"';
}

std::string Report::json() const {
  std::string out = "{\"findings\": [";
  for (const Finding& f : findings) {
    if (&f != &findings.front()) out += ", ";
    out += "{\"kind\": " + quoted(f.kind) + ", \"message\": " + quoted(f.message) +
           ", \"pc\": " + std::to_string(f.pc) + ", \"block\": [" + std::to_string(f.block[0]) + ", " +
           std::to_string(f.block[1]) + ", " + std::to_string(f.block[2]) +
           "], \"warp\": " + std::to_string(f.warp) + ", \"lanes\": " + std::to_string(f.lanes) +
           ", \"times\": " + std::to_string(f.times) + "}";
  }
  out += "], \"warp_instructions\": " + std::to_string(warp_instructions) + ", \"executed\": [";
  for (size_t pc = 0; pc < executed.size(); ++pc) out += (pc ? "," : "") + std::to_string(executed[pc]);
  out += "], \"traffic\": [";
  bool first = true;
  for (size_t pc = 0; pc < traffic.size(); ++pc) {
    const Traffic& t = traffic[pc];
    if (!t.requests) continue;
    out += (first ? "[" : ", [") + std::to_string(pc);
    for (const uint64_t n : {t.requests, t.wavefronts, t.ideal_wavefronts, t.sectors, t.ideal_sectors})
      out += ", " + std::to_string(n);
    out += "]";
    first = false;
  }
  return out + "]}";
}

// A pass serves 32 lanes of up to 4 bytes, 16 of 8, 8 of 16; each bank gives one word of it at a time.
void count_shared(Traffic& t, const uint64_t* address, Mask lanes, uint32_t bytes) {
  const int per_pass = bytes <= 4 ? 32 : bytes == 8 ? 16 : 8;
  const uint32_t words = bytes <= 4 ? 1 : bytes / 4;
  ++t.requests;
  for (int first = 0; first < kLanes; first += per_pass) {
    uint64_t in_bank[32][32];
    uint32_t count[32] = {}, most = 0, distinct = 0;
    for (int l = first; l < first + per_pass; ++l) {
      if (!(lanes >> l & 1)) continue;
      for (uint32_t k = 0; k < words; ++k) {
        const uint64_t word = (address[l] >> 2) + k;
        uint64_t* bank = in_bank[word & 31];
        uint32_t& n = count[word & 31];
        if (std::find(bank, bank + n, word) != bank + n) continue;
        bank[n++] = word;
        ++distinct;
        most = std::max(most, n);
      }
    }
    t.wavefronts += most;
    t.ideal_wavefronts += (distinct + 31) / 32;
  }
}

void count_global(Traffic& t, const uint64_t* address, Mask lanes, uint32_t bytes) {
  uint64_t sorted[kLanes];
  int n = 0;
  for (Mask left = lanes; left; left &= left - 1) sorted[n++] = address[__builtin_ctz(left)];
  if (!std::is_sorted(sorted, sorted + n)) std::sort(sorted, sorted + n);
  uint64_t distinct = 0, sectors = 0;
  for (int k = 0; k < n; ++k) {
    distinct += k == 0 || sorted[k] != sorted[k - 1];
    sectors += k == 0 || sorted[k] >> 5 != sorted[k - 1] >> 5;
  }
  ++t.requests;
  t.sectors += sectors;
  t.ideal_sectors += (distinct * bytes + 31) / 32;
}

}  // namespace ptx
