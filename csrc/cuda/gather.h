// Rows of a cache by their numbers: reordering beams, copying pages, gathering sequences.
#pragma once
#include "types.h"

namespace tw::cuda {

// to[to_index[i]] = from[from_index[i]] for i in [0, count); an absent index counts 0, 1, 2, ... Numbers
// outside are passed over. from and to share no memory, and to_index names nothing twice.
struct GatherArgs {
  Heads from, to;  // (rows, heads, tokens, dim), elements of `item` bytes: 1, 2 or 4
  const int64_t* from_index = nullptr;
  const int64_t* to_index = nullptr;
  int64_t from_rows = 0, to_rows = 0;
  int64_t count = 0;  // less than 2^31
  int heads = 0, tokens = 0, dim = 0;
  int item = 2;
};
cudaError_t gather(const GatherArgs& args, cudaStream_t stream);

}  // namespace tw::cuda
