// Loaded modules and their kernels, as the Python driver and the stand-in for the CUDA runtime use them.
#pragma once

#include <map>
#include <memory>

#include "machine.h"

namespace ptx {

struct Kernel {
  std::unique_ptr<Program> program;
  Report report;  // of the last launch
  uint32_t shared_limit = 48 << 10;
};

class Library {
 public:
  explicit Library(std::string_view text);
  ~Library();
  Kernel& kernel(const std::string& name);
  uint64_t symbol(const std::string& name) const;
  Module module;

 private:
  Symbols symbols_;
  std::vector<std::unique_ptr<uint8_t, Region::Free>> storage_;
  std::map<std::string, Kernel> kernels_;
};

constexpr uint32_t kSharedLimit = 163 << 10;  // of a block on sm_80

Device& device();  // the one of this process
uint64_t static_shared(const Program& p);
// Throws for what a driver would refuse. Errors of the kernel are in the report.
void launch(Kernel& k, const uint32_t grid[3], const uint32_t block[3], uint64_t dynamic_shared,
            std::vector<uint8_t> params, const Options& options);

}  // namespace ptx
