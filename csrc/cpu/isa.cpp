// Detection by CPUID (what the CPU has), XCR0 (what the operating system saves on a context switch)
// and, for AMX, the permission call that Linux wants before tile state may be used.
#include "cpu/isa.h"

#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

namespace tilewright {
namespace {

const char* const kNames[] = {"scalar", "avx2", "avxvnni", "avx512", "avx512bf16", "amx"};
constexpr int kLevels = static_cast<int>(Isa::count);

struct Registers {
  unsigned a = 0, b = 0, c = 0, d = 0;
};

Registers cpuid(unsigned leaf, unsigned subleaf) {
  Registers r;
  if (!__get_cpuid_count(leaf, subleaf, &r.a, &r.b, &r.c, &r.d)) return {};
  return r;
}

bool bit(unsigned word, int i) { return (word >> i) & 1u; }

unsigned long long xcr0() {
  unsigned lo, hi;
  __asm__ volatile("xgetbv" : "=a"(lo), "=d"(hi) : "c"(0));
  return (static_cast<unsigned long long>(hi) << 32) | lo;
}

#if defined(TILEWRIGHT_EMULATE_AMX)
constexpr bool kEmulated = true;
#else
constexpr bool kEmulated = false;
#endif

bool amx_permitted() {
  constexpr long kArchReqXcompPerm = 0x1023, kXfeatureTileData = 18;
  return syscall(SYS_arch_prctl, kArchReqXcompPerm, kXfeatureTileData) == 0;
}

struct Levels {
  bool has[kLevels] = {true};
  Levels() {
    const Registers one = cpuid(1, 0), seven = cpuid(7, 0), seven_one = cpuid(7, 1);
    if (!bit(one.c, 27)) return;  // OSXSAVE
    const auto saved = xcr0();
    const bool ymm = (saved & 0x6) == 0x6, zmm = (saved & 0xe6) == 0xe6;
    auto set = [&](Isa level, bool value) { has[static_cast<int>(level)] = value; };
    const bool avx2 = ymm && bit(one.c, 28) && bit(seven.b, 5) && bit(one.c, 12) && bit(one.c, 29);
    const bool avx512 = avx2 && zmm && bit(seven.b, 16) && bit(seven.b, 30) && bit(seven.b, 17) &&
                        bit(seven.b, 31) && bit(seven.c, 11);
    const bool avx512bf16 = avx512 && bit(seven_one.a, 5);
    set(Isa::avx2, avx2);
    set(Isa::avxvnni, avx2 && bit(seven_one.a, 4));
    set(Isa::avx512, avx512);
    set(Isa::avx512bf16, avx512bf16);
    const bool tiles =
        (saved & 0x60000) == 0x60000 && bit(seven.d, 24) && bit(seven.d, 25) && bit(seven.d, 22);
    set(Isa::amx, avx512bf16 && (kEmulated || (tiles && amx_permitted())));
  }
};

const Levels& levels() {
  static const Levels found;
  return found;
}

Isa choose() {
  const char* wanted = std::getenv("TILEWRIGHT_ISA");
  if (!wanted || !*wanted) return detected();
  std::string available;
  for (int i = 0; i < kLevels; ++i) {
    if (!levels().has[i]) continue;
    if (!std::strcmp(wanted, kNames[i])) return static_cast<Isa>(i);
    available += (available.empty() ? "" : ", ") + std::string(kNames[i]);
  }
  throw std::runtime_error("TILEWRIGHT_ISA=" + std::string(wanted) + ": this machine has " + available +
                           "; the variable may only lower the level");
}

}  // namespace

const char* name_of(Isa isa) { return kNames[static_cast<int>(isa)]; }
bool has(Isa isa) { return levels().has[static_cast<int>(isa)]; }
bool amx_is_emulated() { return kEmulated; }

Isa detected() {
  int best = 0;
  for (int i = 0; i < kLevels; ++i)
    if (levels().has[i]) best = i;
  return static_cast<Isa>(best);
}

Isa active() {
  static const Isa chosen = choose();
  return chosen;
}

}  // namespace tilewright
