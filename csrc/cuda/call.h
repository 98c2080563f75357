// What the calls share: checks, kernels' views of tensors, and the launch itself.
#pragma once
#include <stdexcept>

#include "cuda/calls.h"
#include "cuda/types.h"
#include "ops/check.h"

namespace tilewright::cuda {

inline void expect_here(const char* op, const char* name, const TensorView& t) {
  TW_EXPECT(t.device_type == device_type, op, std::string(name) + " must be a CUDA tensor");
}

inline tw::cuda::Type type_of(DType t) {
  return t == DType::f32    ? tw::cuda::Type::f32
         : t == DType::bf16 ? tw::cuda::Type::bf16
                            : tw::cuda::Type::f16;
}

inline tw::cuda::Rows rows_on_gpu(const TensorView& t) {
  const Rows rows = rows_of(t);
  tw::cuda::Rows r;
  r.base = rows.base;
  r.dims = rows.dims;
  for (int d = 0; d < rows.dims; ++d)
    r.shape[d] = static_cast<uint32_t>(rows.shape[d]), r.strides[d] = rows.strides[d];
  return r;
}

inline tw::cuda::Heads heads_of(const TensorView& t) {
  return {t.data, t.stride(0), t.stride(1), t.stride(2)};
}

// Kernels count rows, tokens and the like in 32 bits.
inline int64_t expect_countable(const char* op, const char* what, int64_t n) {
  if (n >= int64_t{1} << 31)
    throw NotSupported(std::string(op) + ": up to 2**31 - 1 " + what + " are supported on a GPU, got " +
                       std::to_string(n));
  return n;
}

inline uint32_t row_count(const char* op, const TensorView& t) {
  const int64_t rows = t.ndim && t.dim(-1) ? t.numel() / t.dim(-1) : t.numel();
  return static_cast<uint32_t>(expect_countable(op, "rows", rows));
}

// Makes the tensors' device the current one while it lives.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check(cudaGetDevice(&before_));
    if (before_ != device) check(cudaSetDevice(device)), changed_ = true;
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  static void check(cudaError_t e) {
    if (e != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(e));
  }
  int before_ = 0;
  bool changed_ = false;
};

template <class Args>
void launch(const char* op, Where where, cudaError_t (*kernel)(const Args&, cudaStream_t), const Args& args) {
  const DeviceGuard guard(where.device);
  const cudaError_t e = kernel(args, where.stream);
  if (e != cudaSuccess) throw std::runtime_error(std::string(op) + ": CUDA: " + cudaGetErrorString(e));
}

}  // namespace tilewright::cuda
