// What the forward and the backward op of attention share: the checked call, its memory, its tasks.
#pragma once
#include <algorithm>
#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#include "cpu/table.h"
#include "cpu/team.h"
#include "ops.h"
#include "ops/check.h"

namespace tilewright {

constexpr const char* kAttention = "attention";

// A (batch, heads, seq, head_dim) operand whose last dimension is contiguous.
AttentionTensor attention_operand(const char* name, const TensorView& t);

// Everything about a call but its results: operands, options and sequences, checked.
struct AttentionCall {
  AttentionArgs a;
  std::vector<AttentionSequence> sequences;
  int64_t longest = 0, most_rows = 0;  // keys; query rows of a KV head
  int64_t pairs = 0;                   // of a query row and a key, over sequences and KV heads, at most

  AttentionCall(const AttentionInputs& in, const AttentionOptions& options);

  // Few enough multiply-adds that waking the team costs more than it saves.
  bool is_small() const { return double(pairs) * double(a.head_dim + a.v_dim) < double(1 << 18); }

 private:
  void read_sequences(const AttentionInputs& in);
};

// Packed K and V of every key block, and the tasks that fill them.
int64_t total_blocks(const AttentionCall& call);
std::vector<AttentionTask> key_tasks(const AttentionCall& call);

// Memory for the length of a call: the thread's scratch while small, else returned to the system at the end.
class Workspace {
 public:
  explicit Workspace(int64_t bytes) {
    constexpr int64_t kKept = 128 << 20;
    if (bytes <= kKept) {
      data_ = scratch(Scratch::operands, std::max<int64_t>(bytes, 64));
    } else {
      owned_.reset(allocate(bytes));
      data_ = owned_.get();
    }
  }
  float* floats() const { return static_cast<float*>(data_); }

 private:
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  std::unique_ptr<void, Free> owned_;
  void* data_;
};

template <class Fn>
void run_tasks(int64_t tasks, bool serial, int64_t scratch_bytes, const Fn& fn) {
  const auto one = [&](int64_t task) { fn(task, scratch(Scratch::panel, scratch_bytes)); };
  if (serial) {
    for (int64_t i = 0; i < tasks; ++i) one(i);
  } else {
    parallel_tasks(tasks, one);
  }
}

}  // namespace tilewright
