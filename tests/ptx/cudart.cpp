// The functions of the CUDA runtime that nvcc's host code calls, so that real launchers run on the
// interpreter: link with `nvcc -cudart none`, load after this library. Names, arguments and error codes are
// those of NVIDIA's "CUDA Runtime API"; a function that is not here is an undefined symbol when the launcher
// is loaded. Everything happens at once and in order, whatever the stream. A kernel that does something wrong
// leaves cudaErrorLaunchFailure, and its report for ptx_runtime_take.
#include <cstring>
#include <utility>

#include "library.h"

namespace {

using Error = int;
enum : Error {
  kSuccess = 0,
  kInvalidValue = 1,
  kMemoryAllocation = 2,
  kInvalidConfiguration = 9,
  kInvalidSymbol = 13,
  kInvalidDeviceFunction = 98,
  kInvalidDevice = 101,
  kInvalidPtx = 218,
  kLaunchFailure = 719
};

struct Dim3 {
  unsigned x, y, z;
};
struct Call {
  Dim3 grid, block;
  size_t shared;
  void* stream;
};
struct Entry {  // a __global__ function of a loaded library
  ptx::Library* library;
  std::string name;
};
struct Runtime {
  std::map<void*, std::unique_ptr<ptx::Library>> libraries;  // by handle
  std::map<const ptx::Library*, int> numbers;                // in the order in which they were loaded
  int next_number = 0;
  std::map<const void*, Entry> functions;  // by the address of the host's stub
  std::map<const void*, std::pair<uint64_t, size_t>> variables;
  std::map<void*, size_t> allocations;
  std::vector<Call> calls;
  ptx::Options options;
  Error last = kSuccess;
  std::string launches;  // JSON, of each launch since they were last taken
  std::string problem;   // what could not be loaded: said when it is used
  bool capturing = false;
  int device = 0;  // the current one
};
Runtime& runtime() {
  static Runtime r;
  return r;
}

Error failed(Error e) { return runtime().last = e; }

// The PTX of a fat binary: NVIDIA's container holds pieces for several targets, each with its own header.
std::string_view find_ptx(const void* wrapper) {
  struct Wrapper {
    uint32_t magic, version;
    const uint8_t* data;
  };
  struct Header {
    uint32_t magic;
    uint16_t version, header_bytes;
    uint64_t bytes;
  };
  struct Piece {
    uint16_t kind, version;
    uint32_t header_bytes;
    uint64_t bytes;
  };
  const uint8_t* at = static_cast<const Wrapper*>(wrapper)->data;
  Header header;
  std::memcpy(&header, at, sizeof header);
  if (header.magic != 0xba55ed50) throw ptx::Error("this is not a fat binary of nvcc");
  const uint8_t* const end = at + header.header_bytes + header.bytes;
  for (at += header.header_bytes; at < end;) {
    Piece piece;
    std::memcpy(&piece, at, sizeof piece);
    const std::string_view text(reinterpret_cast<const char*>(at) + piece.header_bytes, piece.bytes);
    if (piece.kind == 1) {
      const size_t first = text.find_first_not_of("\n ");
      if (first == text.npos || (text[first] != '.' && text[first] != '/'))
        throw ptx::Error("the PTX in the fat binary is compressed: compile with --compress-mode=none");
      return text.substr(0, text.find('\0'));
    }
    at += piece.header_bytes + piece.bytes;
  }
  throw ptx::Error("the fat binary holds no PTX: compile with -arch=sm_80, which embeds it");
}

ptx::Kernel* kernel_of(const void* function) {
  const auto found = runtime().functions.find(function);
  if (found == runtime().functions.end())
    throw ptx::Error(runtime().problem.empty() ? "no kernel is registered at this address"
                                               : runtime().problem);
  return &found->second.library->kernel(found->second.name);
}

Error launch(const void* function, Dim3 grid, Dim3 block, void** args, size_t shared, void* stream) {
  Runtime& r = runtime();
  std::string name = "?";
  const auto record = [&](const std::string& more) {
    r.launches += (r.launches.empty() ? "" : ", ") + std::string("{\"kernel\": ") + ptx::quoted(name) +
                  ", \"grid\": [" + std::to_string(grid.x) + ", " + std::to_string(grid.y) + ", " +
                  std::to_string(grid.z) + "], \"block\": [" + std::to_string(block.x) + ", " +
                  std::to_string(block.y) + ", " + std::to_string(block.z) +
                  "], \"shared\": " + std::to_string(shared) + ", \"device\": " + std::to_string(r.device) +
                  ", \"stream\": " + std::to_string(reinterpret_cast<uintptr_t>(stream)) + ", " + more + "}";
  };
  ptx::Kernel* k;
  try {
    if (const auto f = r.functions.find(function); f != r.functions.end()) name = f->second.name;
    k = kernel_of(function);
  } catch (const std::exception& e) {
    record("\"error\": " + ptx::quoted(e.what()));
    return failed(kInvalidPtx);
  }
  if (shared + ptx::static_shared(*k->program) > k->shared_limit) {
    record("\"error\": " + ptx::quoted("more shared memory than cudaFuncSetAttribute allowed: " +
                                       std::to_string(k->shared_limit)));
    return failed(kInvalidValue);
  }
  std::vector<uint8_t> params(k->program->param_bytes);
  const auto& places = k->program->functions.front().params;
  for (size_t n = 0; n < places.size(); ++n)
    std::memcpy(params.data() + places[n].at, args[n], places[n].size);
  const uint32_t sizes[] = {grid.x, grid.y, grid.z}, threads[] = {block.x, block.y, block.z};
  try {
    ptx::launch(*k, sizes, threads, shared, std::move(params), r.options);
  } catch (const std::exception& e) {
    record("\"error\": " + ptx::quoted(e.what()));
    return failed(kInvalidConfiguration);
  }
  record("\"report\": " + k->report.json());
  return k->report.findings.empty() ? kSuccess : failed(kLaunchFailure);
}

// A copy between host and device: what is the device's must be allocated, and undefined bits go along.
Error copy(void* to, const void* from, size_t bytes) {
  ptx::Device& d = ptx::device();
  const auto a = reinterpret_cast<uint64_t>(to), b = reinterpret_cast<uint64_t>(from);
  ptx::Region *t = d.find(a), *f = d.find(b);
  if ((t && a + bytes > t->end) || (f && b + bytes > f->end)) return failed(kInvalidValue);
  std::memmove(to, from, bytes);
  if (t && f && f->shadow) {
    t->undefine(a, 0, true);
    std::memmove(t->shadow_at(a), f->shadow_at(b), bytes);
  } else if (t) {
    t->undefine(a, bytes, false);
  }
  return kSuccess;
}

}  // namespace

#define PTX_API extern "C" __attribute__((visibility("default")))

// Of the Python driver: the launches since the last call, as a JSON list.
PTX_API const char* ptx_runtime_take() {
  static std::string taken;
  taken = "[" + runtime().launches + "]";
  runtime().launches.clear();
  runtime().last = kSuccess;
  return taken.c_str();
}
// How many libraries were loaded so far; a kernel of those from `first` to before `end`, as two may have one
// name.
PTX_API int ptx_runtime_libraries() { return runtime().next_number; }
PTX_API ptx::Kernel* ptx_runtime_kernel(const char* name, int first, int end) {
  for (const auto& [address, entry] : runtime().functions)
    if (const int n = runtime().numbers[entry.library]; entry.name == name && n >= first && n < end)
      return &entry.library->kernel(name);
  return nullptr;
}
PTX_API int ptx_runtime_device() { return runtime().device; }
PTX_API void ptx_runtime_options(uint64_t seed, int resident, uint64_t max_warp_instructions, int capturing) {
  runtime().options.seed = seed, runtime().options.resident = resident;
  runtime().options.max_warp_instructions = max_warp_instructions;
  runtime().capturing = capturing;
}

PTX_API void** __cudaRegisterFatBinary(void* wrapper) {
  auto** handle = new void*(wrapper);
  try {
    auto& library = runtime().libraries[handle] = std::make_unique<ptx::Library>(find_ptx(wrapper));
    runtime().numbers[library.get()] = runtime().next_number++;
  } catch (const std::exception& e) {
    runtime().problem = e.what();
  }
  return handle;
}
PTX_API void __cudaRegisterFatBinaryEnd(void**) {}
PTX_API void __cudaUnregisterFatBinary(void** handle) {
  Runtime& r = runtime();
  const auto found = r.libraries.find(handle);
  if (found != r.libraries.end()) {
    std::erase_if(r.functions, [&](const auto& f) { return f.second.library == found->second.get(); });
    r.libraries.erase(found);
  }
  delete handle;
}
PTX_API void __cudaRegisterFunction(void** handle, const char* function, char*, const char* name, int, void*,
                                    void*, void*, void*, int*) {
  const auto found = runtime().libraries.find(handle);
  if (found != runtime().libraries.end()) runtime().functions[function] = {found->second.get(), name};
}
PTX_API void __cudaRegisterVar(void** handle, char* variable, char*, const char* name, int, size_t bytes, int,
                               int) {
  const auto found = runtime().libraries.find(handle);
  if (found == runtime().libraries.end()) return;
  try {
    runtime().variables[variable] = {found->second->symbol(name), bytes};
  } catch (const std::exception&) {  // not in the PTX: unused there
  }
}
PTX_API char __cudaInitModule(void**) { return 1; }

PTX_API unsigned __cudaPushCallConfiguration(Dim3 grid, Dim3 block, size_t shared, void* stream) {
  runtime().calls.push_back({grid, block, shared, stream});
  return 0;
}
PTX_API Error __cudaPopCallConfiguration(Dim3* grid, Dim3* block, size_t* shared, void* stream) {
  if (runtime().calls.empty()) return failed(kInvalidConfiguration);
  const Call c = runtime().calls.back();
  runtime().calls.pop_back();
  *grid = c.grid, *block = c.block, *shared = c.shared;
  std::memcpy(stream, &c.stream, sizeof c.stream);
  return kSuccess;
}
PTX_API Error __cudaGetKernel(const void** kernel, const void* function) {
  *kernel = function;
  return kSuccess;
}
PTX_API Error cudaLaunchKernel(const void* function, Dim3 grid, Dim3 block, void** args, size_t shared,
                               void* stream) {
  return launch(function, grid, block, args, shared, stream);
}
PTX_API Error __cudaLaunchKernel(const void* kernel, Dim3 grid, Dim3 block, void** args, size_t shared,
                                 void* stream) {
  return launch(kernel, grid, block, args, shared, stream);
}

// Two devices of one kind, whose memory is the same.
PTX_API Error cudaGetDeviceCount(int* n) { return *n = 2, kSuccess; }
PTX_API Error cudaGetDevice(int* n) { return *n = runtime().device, kSuccess; }
PTX_API Error cudaSetDevice(int n) {
  if (n < 0 || n > 1) return failed(kInvalidDevice);
  runtime().device = n;
  return kSuccess;
}

// Of an A100; the numbers are cudaDeviceAttr's.
PTX_API Error cudaDeviceGetAttribute(int* value, int attribute, int) {
  static const std::map<int, int> values = {
      {1, 1024},                                  // MaxThreadsPerBlock
      {2, 1024},                                  // MaxBlockDimX
      {3, 1024},                                  // MaxBlockDimY
      {4, 64},                                    // MaxBlockDimZ
      {5, 0x7fffffff},                            // MaxGridDimX
      {6, 65535},                                 // MaxGridDimY
      {7, 65535},                                 // MaxGridDimZ
      {8, 48 << 10},                              // MaxSharedMemoryPerBlock
      {9, 65536},                                 // TotalConstantMemory
      {10, 32},                                   // WarpSize
      {12, 65536},                                // MaxRegistersPerBlock
      {16, 108},                                  // MultiProcessorCount
      {38, 40 << 20},                             // L2CacheSize
      {39, 2048},                                 // MaxThreadsPerMultiProcessor
      {75, 8},                                    // ComputeCapabilityMajor
      {76, 0},                                    // ComputeCapabilityMinor
      {81, 164 << 10},                            // MaxSharedMemoryPerMultiprocessor
      {82, 65536},                                // MaxRegistersPerMultiprocessor
      {97, static_cast<int>(ptx::kSharedLimit)},  // MaxSharedMemoryPerBlockOptin
      {106, 32},                                  // MaxBlocksPerMultiprocessor
      {111, 1024},                                // ReservedSharedMemoryPerBlock
      {115, 1},                                   // MemoryPoolsSupported
  };
  const auto found = values.find(attribute);
  if (found == values.end()) return failed(kInvalidValue);
  *value = found->second;
  return kSuccess;
}

PTX_API Error cudaFuncSetAttribute(const void* function, int attribute, int value) {
  if (attribute == 9) return kSuccess;  // PreferredSharedMemoryCarveout: a hint
  if (attribute != 8 || value < 0 || static_cast<uint32_t>(value) > ptx::kSharedLimit)
    return failed(kInvalidValue);
  try {
    ptx::Kernel* k = kernel_of(function);
    if (value + ptx::static_shared(*k->program) > ptx::kSharedLimit) return failed(kInvalidValue);
    k->shared_limit =
        std::max<uint32_t>(48u << 10, static_cast<uint32_t>(value + ptx::static_shared(*k->program)));
    return kSuccess;
  } catch (const std::exception&) {
    return failed(kInvalidDeviceFunction);
  }
}

// By threads and shared memory; registers are not known here.
PTX_API Error cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void* function,
                                                                     int threads, size_t shared, unsigned) {
  try {
    if (threads <= 0) return failed(kInvalidValue);
    const uint64_t bytes = shared + ptx::static_shared(*kernel_of(function)->program) + 1024;
    *blocks = static_cast<int>(std::min<uint64_t>(
        {32, 2048u / static_cast<unsigned>((threads + 31) / 32 * 32), (164 << 10) / bytes}));
    return kSuccess;
  } catch (const std::exception&) {
    return failed(kInvalidDeviceFunction);
  }
}
PTX_API Error cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void* function, int threads,
                                                            size_t shared) {
  return cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(blocks, function, threads, shared, 0);
}

PTX_API Error cudaMalloc(void** p, size_t bytes) {
  if (runtime().capturing) return failed(kMemoryAllocation);
  // With room behind it that belongs to nobody.
  *p = std::aligned_alloc(256, (bytes + 511) / 256 * 256);
  if (!*p) return failed(kMemoryAllocation);
  std::memset(*p, 0xcd, bytes);
  runtime().allocations[*p] = bytes;
  ptx::device().add(reinterpret_cast<uint64_t>(*p), bytes, false, "cudaMalloc of " + std::to_string(bytes));
  return kSuccess;
}
PTX_API Error cudaFree(void* p) {
  if (!p) return kSuccess;
  if (!runtime().allocations.erase(p)) return failed(kInvalidValue);
  ptx::device().remove(reinterpret_cast<uint64_t>(p));
  std::free(p);
  return kSuccess;
}
PTX_API Error cudaMallocAsync(void** p, size_t bytes, void*) { return cudaMalloc(p, bytes); }
PTX_API Error cudaFreeAsync(void* p, void*) { return cudaFree(p); }
PTX_API Error cudaMemcpy(void* to, const void* from, size_t bytes, int) { return copy(to, from, bytes); }
PTX_API Error cudaMemcpyAsync(void* to, const void* from, size_t bytes, int, void*) {
  return copy(to, from, bytes);
}
PTX_API Error cudaMemsetAsync(void* p, int value, size_t bytes, void*) {
  const std::vector<uint8_t> from(bytes, static_cast<uint8_t>(value));
  const auto at = reinterpret_cast<uint64_t>(p);
  if (bytes && !ptx::device().find(at)) return failed(kInvalidValue);
  return copy(p, from.data(), bytes);
}
PTX_API Error cudaMemset(void* p, int value, size_t bytes) {
  return cudaMemsetAsync(p, value, bytes, nullptr);
}
PTX_API Error cudaMemcpyToSymbol(const void* symbol, const void* from, size_t bytes, size_t offset, int) {
  const auto found = runtime().variables.find(symbol);
  if (found == runtime().variables.end()) return failed(kInvalidSymbol);
  if (offset + bytes > found->second.second) return failed(kInvalidValue);
  return copy(reinterpret_cast<void*>(found->second.first + offset), from, bytes);
}

PTX_API Error cudaStreamSynchronize(void*) { return runtime().capturing ? failed(900) : runtime().last; }
PTX_API Error cudaDeviceSynchronize() { return cudaStreamSynchronize(nullptr); }
PTX_API Error cudaStreamIsCapturing(void*, int* status) { return *status = runtime().capturing, kSuccess; }
PTX_API Error cudaPeekAtLastError() { return runtime().last; }
PTX_API Error cudaGetLastError() { return std::exchange(runtime().last, kSuccess); }
PTX_API const char* cudaGetErrorName(Error e) {
  switch (e) {
    case kSuccess:
      return "cudaSuccess";
    case kInvalidValue:
      return "cudaErrorInvalidValue";
    case kMemoryAllocation:
      return "cudaErrorMemoryAllocation";
    case kInvalidConfiguration:
      return "cudaErrorInvalidConfiguration";
    case kInvalidSymbol:
      return "cudaErrorInvalidSymbol";
    case kInvalidDeviceFunction:
      return "cudaErrorInvalidDeviceFunction";
    case kInvalidDevice:
      return "cudaErrorInvalidDevice";
    case kInvalidPtx:
      return "cudaErrorInvalidPtx";
    case kLaunchFailure:
      return "cudaErrorLaunchFailure";
    case 900:
      return "cudaErrorStreamCaptureUnsupported";
    default:
      return "unknown";
  }
}
PTX_API const char* cudaGetErrorString(Error e) { return cudaGetErrorName(e); }
