#include <chrono>
#include <string>

#include "cpu/table.h"
#include "cpu/team.h"
#include "ops.h"
#include "ops/check.h"

namespace tilewright {

double ceiling(const std::string& kind, const TensorView& data, int64_t iterations) {
  const char* const op = "ceiling";
  TW_EXPECT(iterations >= 1, op, "iterations must be at least 1, got " + std::to_string(iterations));
  constexpr int64_t kUnit = 1024;  // what ceiling_read wants a part to be a multiple of
  const int threads = num_threads();
  double work = 0;
  const auto start = std::chrono::steady_clock::now();
  if (kind == "read") {
    TW_EXPECT(data && data.dtype == DType::u8 && data.ndim == 1 && data.stride(0) == 1 &&
                  data.dim(0) % kUnit == 0 && data.dim(0) > 0,
              op, "data must be contiguous uint8 of one dimension, a positive multiple of 1024 long");
    expect_cpu(op, "data", data);
    const auto& kernel = table().ceiling_read;
    parallel_ranges(data.dim(0) / kUnit, 1, [&](int64_t begin, int64_t end) {
      kernel.fn(data.as<const uint8_t>() + begin * kUnit, (end - begin) * kUnit, iterations);
    });
    work = double(data.dim(0)) * double(iterations);
  } else {
    const auto& t = table();
    TW_EXPECT(kind == "fp32" || kind == "bf16" || kind == "int8", op,
              "kind must be read, fp32, bf16 or int8, got \"" + kind + "\"");
    const auto& kernel = kind == "fp32" ? t.ceiling_fp32 : kind == "bf16" ? t.ceiling_bf16 : t.ceiling_int8;
    double operations = 0;  // of one thread; all do the same
    kernel.fn(1, operations);
    work = operations * double(iterations) * threads;
    parallel_tasks(threads, [&](int64_t) {
      double mine;
      kernel.fn(iterations, mine);
    });
  }
  return work / std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

}  // namespace tilewright
