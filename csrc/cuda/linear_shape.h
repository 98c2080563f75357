// How a block of a matrix product is divided.
#pragma once

namespace tw::cuda {

// A tile of BM x BN, cut into WARPS_M x WARPS_N parts for a warp each; HALVES warps share a part and take a
// half of each step's columns.
template <int BM_, int BN_, int WARPS_M, int WARPS_N, int HALVES = 1>
struct Shape {
  static constexpr int BM = BM_, BN = BN_, kWarpsN = WARPS_N, kHalves = HALVES;
  static constexpr int kThreads = 32 * WARPS_M * WARPS_N * HALVES;
  static constexpr int MI = BM / WARPS_M / 16, NI = BN / WARPS_N / 8;  // products of a warp, 16 x 8
};

}  // namespace tw::cuda
