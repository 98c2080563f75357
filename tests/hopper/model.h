// sm_90a's asynchronous half on a CPU, for the kernels that are written for it: TMA, mbarriers and wgmma as
// NVIDIA's "PTX ISA" describes them, under the names of csrc/cuda/hopper.cuh. A kernel's source is compiled
// by g++ against this; every thread of a block is a fiber, and a fiber runs until it must wait.
//
// Copies and products happen as early or as late as they may: at once; or not before every thread waits
// (copies, in any order), and when their group is waited for (products, which then read whatever is there).
// A product's registers are read and written then, too.
#pragma once
#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <random>
#include <set>
#include <string>
#include <type_traits>
#include <vector>

#undef __launch_bounds__
#define __launch_bounds__(...)
#define __CUDA_ARCH_FEAT_SM90_ALL
#define TILEWRIGHT_CUDA_WGMMA
#define cudaFuncSetAttribute(...) cudaSuccess
#define cudaGetLastError() cudaSuccess
#define cudaGetDriverEntryPointByVersion(...) model::driver_entry(__VA_ARGS__)
#define cudaGetDevice(...) cudaSuccess
#define cudaDeviceGetAttribute(to, which, ...) \
  (*(to) = (which) == cudaDevAttrComputeCapabilityMajor ? 9 : 0, cudaSuccess)

namespace tw::cuda {

namespace model {

constexpr int kMostThreads = 512;
constexpr uint32_t kBase = 3 * 1024 + 16;  // where dynamic shared memory begins: no multiple of 1,024

struct Options {
  bool late_products = false, late_copies = false;
  unsigned seed = 0;
  int skipped = 0;  // the line whose waiting (or arrival) does nothing
};
struct Product {
  int columns;
  bool registers, transposed, add, half;
  float (*d)[4];
  const uint32_t (*a)[4];
  uint64_t a_at, b_at;
};
struct Fiber {
  ucontext_t context;
  std::vector<char> stack;
  bool done = false;
  std::vector<std::vector<Product>> groups;  // committed
  std::vector<Product> open;
  size_t finished = 0;  // groups
};
struct Meeting {
  int here = 0;
  int64_t number = 0;
};
struct Map {  // in a CUtensorMap
  const uint8_t* data;
  int64_t sizes[4], strides[4];  // strides in bytes
  int box[2], item, swizzle;
};
struct Copy {
  uint32_t to;
  Map map;
  int from[4];
  uint64_t* barrier;
};
struct Barrier {  // what a kernel sees as 64 bits
  uint16_t count, missing : 15, odd : 1;
  int32_t bytes;
};
static_assert(sizeof(Barrier) == 8 && sizeof(Map) <= sizeof(CUtensorMap));

inline Options options;
inline std::string fault;
inline std::set<int> lines;  // of the kernel, that wait or arrive
inline Fiber fibers[kMostThreads];
inline ucontext_t scheduler;
inline int threads;
inline int64_t progress;
inline Meeting block, named[16], warps[kMostThreads / 32];
inline std::vector<uint8_t> memory;
inline std::vector<Copy> copies;
inline std::set<const uint64_t*> barriers;  // that are initialised
inline uint32_t exchanged[kMostThreads];

}  // namespace model

struct Index {
  unsigned x;
};
inline Index threadIdx, blockIdx;

namespace model {

inline void yield() {
  const unsigned me = threadIdx.x;
  swapcontext(&fibers[me].context, &scheduler);
  threadIdx.x = me;
}
// Ends the launch with what is wrong.
[[noreturn]] inline void fail(const std::string& what) {
  fault = what;
  setcontext(&scheduler);
  __builtin_unreachable();
}
inline bool skips(int line) {
  lines.insert(line);
  return line == options.skipped;
}
inline void meet(Meeting& m, int count) {
  const int64_t number = m.number;
  if (++m.here == count) {
    m.here = 0, ++m.number, ++progress;
  } else {
    while (m.number == number) yield();
  }
}
inline void meet_warp() { meet(warps[threadIdx.x / 32], 32); }

inline uint8_t* shared_memory() { return memory.data(); }
inline uint8_t* at_shared(uint32_t address, int bytes) {
  if (address < kBase || address + bytes > kBase + memory.size()) fail("an address beyond shared memory");
  return memory.data() + (address - kBase);
}
// The 16-byte pieces of 128 bytes trade places; mask: of 7, 3 or 1 bits' worth of pieces.
inline uint32_t swizzled(uint32_t address, int mask) { return address ^ ((address >> 7 & mask) << 4); }

inline CUresult encode(CUtensorMap* to, CUtensorMapDataType type, cuuint32_t rank, void* data,
                       const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t* box,
                       const cuuint32_t* step, CUtensorMapInterleave, CUtensorMapSwizzle swizzle,
                       CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  Map map = {static_cast<const uint8_t*>(data), {1, 1, 1, 1}, {}, {int(box[0]), int(box[1])}, 0, 0};
  map.item = type == CU_TENSOR_MAP_DATA_TYPE_UINT8 ? 1 : 2;
  map.swizzle = swizzle == CU_TENSOR_MAP_SWIZZLE_128B ? 7 : swizzle == CU_TENSOR_MAP_SWIZZLE_64B ? 3 : 1;
  bool valid =
      data && reinterpret_cast<uintptr_t>(data) % 16 == 0 && box[0] * map.item == 16u * (map.swizzle + 1);
  for (unsigned i = 0; i < rank; ++i) {
    map.sizes[i] = sizes[i], map.strides[i] = i ? strides[i - 1] : map.item;
    valid &= sizes[i] > 0 && box[i] <= 256 && step[i] == 1 && (i == 0 || strides[i - 1] % 16 == 0) &&
             (i < 2 || box[i] == 1);
  }
  std::memcpy(static_cast<void*>(to), &map, sizeof map);
  return valid ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}
inline cudaError_t driver_entry(const char*, void** to, unsigned, unsigned long long,
                                cudaDriverEntryPointQueryResult* result) {
  *to = reinterpret_cast<void*>(&encode), *result = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}

inline Barrier& barrier_at(uint64_t* barrier) {
  if (!barriers.count(barrier)) fail("an mbarrier before its initialisation");
  return *reinterpret_cast<Barrier*>(barrier);
}
inline void settle(Barrier& b) {
  if (b.missing == 0 && b.bytes == 0) b.missing = b.count, b.odd ^= 1, ++progress;
}
inline void arrive(uint64_t* barrier, int bytes) {
  Barrier& b = barrier_at(barrier);
  if (b.missing == 0) fail("more arrivals at an mbarrier than it counts");
  --b.missing, b.bytes += bytes;
  settle(b);
}

inline void bring(const Copy& copy) {
  const Map& map = copy.map;
  const int width = map.box[0] * map.item;
  if (copy.to % 128) fail("a TMA destination that is not a multiple of 128 bytes");
  for (int row = 0; row < map.box[1]; ++row)
    for (int column = 0; column < map.box[0]; ++column) {
      const int64_t at[4] = {copy.from[0] + column, copy.from[1] + row, copy.from[2], copy.from[3]};
      int64_t offset = 0;
      bool inside = true;
      for (int i = 0; i < 4; ++i)
        inside &= at[i] >= 0 && at[i] < map.sizes[i], offset += at[i] * map.strides[i];
      uint8_t* to = at_shared(swizzled(copy.to + row * width + column * map.item, map.swizzle), map.item);
      std::memset(to, 0, map.item);
      if (inside) std::memcpy(to, map.data + offset, map.item);
    }
  Barrier& b = barrier_at(copy.barrier);
  b.bytes -= map.box[1] * width, ++progress;
  settle(b);
}
inline void start(void* to, const CUtensorMap* map, int column, int row, int head, int batch,
                  uint64_t* barrier);

inline float number(uint16_t bits, bool half) {
  if (half) return __half2float(reinterpret_cast<const __half&>(bits));
  return __bfloat162float(reinterpret_cast<const __nv_bfloat16&>(bits));
}
struct Operand {  // a descriptor, in bytes
  uint32_t start, leading, stride;
  explicit Operand(uint64_t d)
      : start((d & 0x3fff) << 4), leading((d >> 16 & 0x3fff) << 4), stride((d >> 32 & 0x3fff) << 4) {
    if (d >> 46 != uint64_t{1} << 16) fail("a descriptor that is not of the 128-byte swizzle");
  }
  float at(uint32_t offset, bool half) const {
    uint16_t bits;
    std::memcpy(&bits, at_shared(swizzled(start + offset, 7), 2), 2);
    return number(bits, half);
  }
  // "K-major": element k of row `row`; "MN-major": element `row` of k.
  float row_major(int row, int k, bool half) const {
    return at(row % 8 * 128 + row / 8 * stride + k * 2, half);
  }
  float column_major(int row, int k, bool half) const {
    return at(row % 64 * 2 + row / 64 * leading + k % 8 * 128 + k / 8 * stride, half);
  }
};
// This thread's part of a product: rows g and g + 8 of its warp's 16, columns 2 t and 2 t + 1 of each 8.
inline void multiply(size_t group, size_t index) {
  const int me = threadIdx.x, g = me % 32 / 4, t = me % 4, warp_row = me / 32 % 4 * 16;
  const Product& p = fibers[me].groups[group][index];
  const Operand b(p.b_at);
  float a[2][16];
  for (int half = 0; half < 2; ++half)
    for (int k = 0; k < 16; ++k)
      if (p.registers) {
        const Product& owner = fibers[me / 4 * 4 + k % 8 / 2].groups[group][index];
        a[half][k] = number((*owner.a)[half + k / 8 * 2] >> k % 2 * 16, p.half);
      } else {
        a[half][k] = Operand(p.a_at).row_major(warp_row + g + 8 * half, k, p.half);
      }
  for (int n = 0; n < p.columns; ++n) {
    if (n % 8 / 2 != t) continue;
    float sum[2] = {};
    for (int k = 0; k < 16; ++k) {
      const float x = p.transposed ? b.column_major(n, k, p.half) : b.row_major(n, k, p.half);
      for (int half = 0; half < 2; ++half) sum[half] += a[half][k] * x;
    }
    for (int half = 0; half < 2; ++half) {
      float& d = p.d[n / 8][2 * half + n % 2];
      d = (p.add ? d : 0) + sum[half];
    }
  }
}
// The oldest groups of products until `left` are under way.
inline void finish(size_t left) {
  meet_warp();
  Fiber& me = fibers[threadIdx.x];
  for (; me.finished + left < me.groups.size(); ++me.finished)
    for (size_t i = 0; i < me.groups[me.finished].size(); ++i) multiply(me.finished, i);
  meet_warp();  // the others have read this thread's registers
}

inline std::function<void()> kernel;
inline void run_fiber() {
  const unsigned me = threadIdx.x;
  kernel();
  fibers[me].done = true, ++progress;
  setcontext(&scheduler);
}
// Blocks one after the other; shared memory holds NaN at first.
inline void launch(int64_t blocks, int block_threads, int shared_bytes, std::function<void()> body) {
  std::mt19937 random(options.seed);
  std::vector<int> order(block_threads);
  threads = block_threads, kernel = std::move(body);
  for (int i = 0; i < threads; ++i) order[i] = i;
  if (threads > kMostThreads || shared_bytes > 232'448) fault = "a launch that no device takes";
  for (int64_t number = 0; number < blocks && fault.empty(); ++number) {
    memory.assign(shared_bytes, 0xff), copies.clear(), barriers.clear();
    block = {};
    for (Meeting& m : named) m = {};
    for (Meeting& m : warps) m = {};
    blockIdx.x = unsigned(number);
    for (int i = 0; i < threads; ++i) {
      Fiber& f = fibers[i];
      f.stack.resize(1 << 16), f.done = false, f.groups.clear(), f.open.clear(), f.finished = 0;
      getcontext(&f.context);
      f.context.uc_stack.ss_sp = f.stack.data(), f.context.uc_stack.ss_size = f.stack.size();
      makecontext(&f.context, run_fiber, 0);
    }
    for (int alive = threads; alive && fault.empty();) {
      const int64_t before = progress;
      std::shuffle(order.begin(), order.end(), random);
      alive = 0;
      for (const int i : order) {
        if (fibers[i].done || !fault.empty()) continue;
        threadIdx.x = i;
        swapcontext(&scheduler, &fibers[i].context);
        alive += !fibers[i].done;
      }
      if (progress != before || !alive || !fault.empty()) continue;
      if (copies.empty()) {
        fault = "a deadlock";
      } else {
        std::swap(copies[random() % copies.size()], copies.back());
        bring(copies.back());
        copies.pop_back();
      }
    }
    if (fault.empty() && !copies.empty()) fault = "a copy that nobody waited for";
  }
}

}  // namespace model

// What CUDA and the headers' inline PTX are on this device.

inline size_t __cvta_generic_to_shared(const void* p) {
  return size_t(static_cast<const uint8_t*>(p) - model::memory.data()) + model::kBase;
}
inline void model::start(void* to, const CUtensorMap* map, int column, int row, int head, int batch,
                         uint64_t* barrier) {
  Copy copy = {uint32_t(__cvta_generic_to_shared(to)), {}, {column, row, head, batch}, barrier};
  std::memcpy(&copy.map, static_cast<const void*>(map), sizeof copy.map);
  if (options.late_copies)
    copies.push_back(copy);
  else
    bring(copy);
}

using std::max;
using std::min;
inline float __fdividef(float x, float y) { return x / y; }
inline float __int_as_float(int x) { return reinterpret_cast<const float&>(x); }
inline float __uint_as_float(uint32_t x) { return reinterpret_cast<const float&>(x); }
inline float exp2_fast(float x) { return std::exp2(x); }
inline float max_nan(float x, float y) { return std::isnan(x) || std::isnan(y) ? NAN : std::max(x, y); }
inline int fresh_lane() { return threadIdx.x % 32; }

inline void __syncthreads(int line = __builtin_LINE()) {
  if (!model::skips(line)) model::meet(model::block, model::threads);
}
inline void __syncwarp() { model::meet_warp(); }
template <class X>
X __shfl_xor_sync(unsigned, X x, int mask) {
  const int me = threadIdx.x;
  std::memcpy(&model::exchanged[me], &x, 4);
  model::meet_warp();
  std::memcpy(&x, &model::exchanged[me ^ mask], 4);
  model::meet_warp();
  return x;
}
inline bool __any_sync(unsigned, bool x) {
  for (int mask = 1; mask < 32; mask *= 2) x |= __shfl_xor_sync(0, int(x), mask) != 0;
  return x;
}

inline void barrier_init(uint64_t* barrier, int count) {
  model::barriers.insert(barrier);
  model::barrier_at(barrier) = {uint16_t(count), uint16_t(count), 0, 0};
}
inline void barrier_init_fence() {}
inline void barrier_arrive(uint64_t* barrier, int line = __builtin_LINE()) {
  if (!model::skips(line)) model::arrive(barrier, 0);
}
inline void barrier_expect(uint64_t* barrier, int bytes) { model::arrive(barrier, bytes); }
inline void barrier_wait(uint64_t* barrier, int parity, int line = __builtin_LINE()) {
  if (model::skips(line)) return;
  while (model::barrier_at(barrier).odd == parity) model::yield();
}
inline void warpgroup_meet(int number, int line = __builtin_LINE()) {
  if (!model::skips(line)) model::meet(model::named[number], 128);
}
template <int N>
void give_registers() {}
template <int N>
void take_registers() {}

inline void copy_tile(void* to, const CUtensorMap* map, int column, int row, uint64_t* barrier) {
  model::start(to, map, column, row, 0, 0, barrier);
}
inline void copy_tile(void* to, const CUtensorMap* map, int column, int row, int head, int batch,
                      uint64_t* barrier) {
  model::start(to, map, column, row, head, batch, barrier);
}

template <class X>
void pin(X&) {}
inline void products_begin() {}
inline void products_commit() {
  model::Fiber& me = model::fibers[threadIdx.x];
  me.groups.push_back(std::move(me.open));
  me.open.clear();
  if (!model::options.late_products) model::finish(0);
}
template <int N>
void products_wait(int line = __builtin_LINE()) {
  if (!model::skips(line)) model::finish(N);
}
template <class T, int N, bool kTransposed>
void multiply_registers(float (*d)[4], const uint32_t (&a)[4], uint64_t b) {
  model::fibers[threadIdx.x].open.push_back(
      {N, true, kTransposed, true, std::is_same_v<T, __half>, d, &a, 0, b});
}
template <class T, int N>
void multiply_shared(float (*d)[4], uint64_t a, uint64_t b, bool add) {
  model::fibers[threadIdx.x].open.push_back(
      {N, false, false, add, std::is_same_v<T, __half>, d, nullptr, a, b});
}

// Of sm_80, named by templates that these kernels do not use.
void copy_async_16(void*, const void*, int = 16);
void load_matrices(uint32_t (&)[4], const void*);
void load_matrices_transposed(uint32_t (&)[4], const void*);

}  // namespace tw::cuda

#define TW_C extern "C" __attribute__((used, visibility("default"))) inline
TW_C void hopper_options(int late_products, int late_copies, int seed, int skipped) {
  tw::cuda::model::options = {late_products != 0, late_copies != 0, unsigned(seed), skipped};
  tw::cuda::model::fault.clear(), tw::cuda::model::lines.clear();
}
// What was wrong with the launches since.
TW_C const char* hopper_fault() { return tw::cuda::model::fault.c_str(); }
// The kernel's lines that wait or arrived since; how many.
TW_C int hopper_lines(int* to, int most) {
  int n = 0;
  for (const int line : tw::cuda::model::lines)
    if (n < most) to[n++] = line;
  return n;
}
