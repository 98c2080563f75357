// What every op that multiplies by packed weights shares: which kernels serve an activation mode, x as they
// read it, and the work of matrices over blocks of outputs and chunks of rows.
#pragma once
#include <algorithm>
#include <string>
#include <vector>

#include "cpu/isa.h"
#include "cpu/kernels.h"
#include "cpu/team.h"
#include "tensor.h"

namespace tilewright {

// Below this many multiply-adds a call stays on its thread: about what waking a worker costs.
constexpr int64_t kLinearSerial = 1 << 16;

class LinearCall {
 public:
  // op: for the error of an unknown activation.
  LinearCall(const char* op, const PackedWeight& w, const std::string& activation);

  LinearArgs args;  // out, bias and residual are the caller's to set

  Isa isa() const { return isa_; }
  LinearKernel kernel() const { return kernel_; }
  int64_t chunk() const { return chunk_; }  // rows of x per pass over the weights

  // Bytes that m rows of x take as the kernels read them, and where they are to lie.
  int64_t operand_bytes(int64_t m) const;
  void place(void* memory, int64_t m);
  // All of x, (m, k), on the team; or, where by_block(), columns [32 kb, 32 kb + 32) of rows [first, first +
  // count) on this thread, from fp32 x (count, 32).
  void prepare(const Rows& x, Storage dtype, int64_t m);
  bool by_block() const { return mode_ != Mode::int8_values && !per_token_; }
  void prepare_block(const Rows& x, int64_t kb, int64_t first, int64_t count);

  // `args` for `blocks` blocks of outputs from `block` on and the rows from `row` on, as if there were no
  // others; out and residual stay the caller's to set.
  LinearArgs from(int64_t block, int64_t blocks, int64_t row) const;

  // The float kernels multiply x by codes and correct for zero points and minima afterwards, where an
  // infinity would become NaN. Whether rows are free of that, and those of rows [begin, end) that are not
  // computed once more from the dequantised weight; they are rare, so plainly.
  bool rows_are_finite(int64_t begin, int64_t end) const;
  void redo_rows_not_finite(const LinearArgs& a, int64_t begin, int64_t end) const;

 private:
  // int8_values: codes that are no integers take the rounded x in fp32.
  enum class Mode { int8, int8_values, bf16, fp32 };

  QuantiseArgs quantise_args() const;
  PrepareArgs prepare_args() const;

  Mode mode_ = Mode::fp32;
  bool per_token_ = false, round_bf16_ = false;
  Isa isa_ = Isa::scalar;
  LinearKernel kernel_ = nullptr;
  PrepareKernel prepare_ = nullptr;
  int64_t chunk_ = 0;
};

// What a product may add: bias, contiguous fp32 (n,), and residual, like out but not in its memory; both may
// be absent.
void expect_bias(const char* op, const char* name, const TensorView& bias, int64_t n);
void expect_residual(const char* op, const TensorView& residual, const TensorView& out);

// v as output n of row r, bias and residual added.
void put_output(const LinearArgs& a, int64_t r, int64_t n, float v);

// A matrix and the rows of x that it multiplies.
struct LinearGroup {
  LinearArgs args;
  int64_t begin, end;
};
// Calls task(args, first, last, begin, end, panel) on the team for blocks [first, last) of the `blocks` of
// each group's matrix and at most `chunk` rows at a time; chunks are the outer loop, so that threads share
// the rows in cache. panel: a kernel's memory, and `extra_bytes` a row behind it (extra_of).
template <class Task>
void run_groups(const std::vector<LinearGroup>& groups, int64_t blocks, int64_t chunk, int64_t extra_bytes,
                Task&& task) {
  struct Chunk {
    const LinearArgs* args;
    int64_t begin, end;
    int64_t before;  // work of the chunks before it
    // Work of a block: its rows, and what reading the weights takes (bench/NOTES.md).
    int64_t block_work() const { return end - begin + 4; }
  };
  std::vector<Chunk> chunks;
  int64_t most = 0, work = 0;
  for (const LinearGroup& g : groups)
    for (int64_t m = g.begin; m < g.end; m += chunk) {
      chunks.push_back({&g.args, m, std::min(g.end, m + chunk), work});
      most = std::max(most, chunks.back().end - m);
      work += chunks.back().block_work() * blocks;
    }
  const int64_t panel_bytes = kPanelBytes + kPanelScaleBytes + most * (128 + extra_bytes);
  const auto one = [&](size_t chunk, int64_t first, int64_t last) {
    const Chunk& c = chunks[chunk];
    task(*c.args, first, last, c.begin, c.end, static_cast<char*>(scratch(Scratch::panel, panel_bytes)));
  };
  const int64_t tasks = static_cast<int64_t>(chunks.size()) * blocks;
  const int64_t k = groups.empty() ? 1 : std::max<int64_t>(1, groups[0].args.w.k);
  const int64_t grain = std::max<int64_t>(1, kLinearSerial / (most * 32 * k));
  // Threads stream through stretches of the weights, which get shorter so that the threads finish together
  // (bench/NOTES.md).
  const int64_t pieces = std::clamp<int64_t>(tasks / grain, 1, 4 * num_threads());
  const auto begin_of = [&](int64_t p) {
    const int64_t done = work - work * (pieces - p) * (pieces - p) / (pieces * pieces);
    size_t c = 0;
    while (c + 1 < chunks.size() && chunks[c + 1].before <= done) ++c;
    return static_cast<int64_t>(c) * blocks + (done - chunks[c].before) / chunks[c].block_work();
  };
  const auto piece = [&](int64_t p) {
    for (int64_t i = begin_of(p), end = begin_of(p + 1), next; i < end; i = next) {
      const int64_t chunk = i / blocks, first = i % blocks;
      next = std::min(end, (chunk + 1) * blocks);
      one(static_cast<size_t>(chunk), first, first + next - i);
    }
  };
  if (pieces == 1)
    piece(0);
  else
    parallel_tasks(pieces, piece);
}
inline float* extra_of(char* panel, int64_t rows) {
  return reinterpret_cast<float*>(panel + kPanelBytes + kPanelScaleBytes + rows * 128);
}

}  // namespace tilewright
