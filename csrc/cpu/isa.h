// Instruction-set levels of the running CPU.
#pragma once

namespace tilewright {

// Ordered from the weakest; each compiled level names the features in its comment in CMakeLists.txt.
// A CPU may have a level without the one before it (Zen 4 has avx512bf16 but not avxvnni).
enum class Isa : int { scalar, avx2, avxvnni, avx512, avx512bf16, amx, count };

const char* name_of(Isa isa);
bool has(Isa isa);       // the CPU and the operating system both support it
bool amx_is_emulated();  // a test build: amx wherever avx512bf16 is
Isa detected();          // the strongest level that the machine has
Isa active();  // detected(), or what TILEWRIGHT_ISA lowered it to; throws if that names a missing level

}  // namespace tilewright
