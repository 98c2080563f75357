// Filling a quantised KV cache (cpu/quantised_kv.h). 8 bits: a token's codes come from the kernel that
// quantises activations, one scale a row, and are put into place here. 4 bits, after KIVI
// (https://arxiv.org/abs/2402.02750): tokens wait in bf16 until `residual` newer ones follow a whole group,
// then keys are quantised per channel and values per token. Plain C++.
#include "ops/kv_quant.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>

#include "cpu/simd.h"
#include "cpu/table.h"
#include "cpu/team.h"
#include "ops/check.h"
#include "ops/overlap.h"

namespace tilewright {
namespace {

constexpr const char* kOp = "kv_append";

uint8_t* checked(const char* op, const char* name, const TensorView& t, DType dtype, int64_t size) {
  TW_EXPECT(t.device_type == 1 && t.dtype == dtype && t.is_contiguous() && t.numel() == size, op,
            "QuantizedKV's " + std::string(name) + " must be a contiguous CPU tensor of " +
                std::to_string(size) + " " + name_of(dtype) + ", got " + name_of(t.dtype) + " " +
                shape_of(t) + "; use QuantizedKV.empty and leave its tensors as they are");
  return t.as<uint8_t>();
}

// Writes the code at row `row` (of 32) and place k of a block's reduction dimension.
void put_code(const QuantisedKv& kv, uint8_t* block, int64_t row, int64_t k, uint8_t code) {
  if (kv.bits == 8) {
    block[k / 4 * 128 + row * 4 + k % 4] = code;
    return;
  }
  uint8_t& both = block[k / 4 * 64 + row % 16 * 4 + k % 4];
  both = row < 16 ? uint8_t((both & 0xf0) | code) : uint8_t((both & 0x0f) | (code << 4));
}

float round_half_even(float x) { return (x + 12582912.0f) - 12582912.0f; }  // |x| < 2^22

// The scale and minimum of 16 codes over `count` numbers, `stride` apart, and the codes: f(i, code).
struct Range {
  bf16 scale, minimum;
};
template <class Fn>
Range quantise_range(const float* x, int64_t count, int64_t stride, Fn&& f) {
  float low = x[0], high = x[0];
  bool bad = false;
  for (int64_t i = 0; i < count; ++i) {
    const float v = x[i * stride];
    low = std::min(low, v), high = std::max(high, v);
    bad |= !(std::fabs(v) < INFINITY);
  }
  const bf16 scale = to_bf16(bad || high - low == INFINITY ? NAN : (high - low) / 15.0f);
  const float step = to_float(scale);
  for (int64_t i = 0; i < count; ++i) {
    const float code = step > 0.0f ? round_half_even(std::min((x[i * stride] - low) / step, 15.0f)) : 0.0f;
    f(i, uint8_t(code));
  }
  return {scale, to_bf16(step == step ? low : 0.0f)};
}

// --- 8 bits ---

void append_codes(const QuantisedKv& kv, const TensorView& x, bool keys, int64_t slot, int64_t begin,
                  int64_t end) {
  // A token's codes and scale, a few tokens at a time.
  constexpr int64_t kTokens = 32, kMaxBlocks = 16;
  int8_t codes[kTokens * kMaxBlocks * 32];
  float scales[kTokens * kMaxBlocks];
  int32_t corrections[kTokens * kMaxBlocks];
  QuantiseArgs a;
  a.dtype = storage_of(x.dtype);
  a.k = kv.head_dim;
  a.k_blocks = a.row_blocks = (kv.head_dim + 31) / 32;
  a.per_token = true;
  a.codes = codes;
  a.scales = scales;
  a.corrections = corrections;
  const int64_t offset = slot / kv.kv_heads * x.stride(0) + slot % kv.kv_heads * x.stride(1);
  for (int64_t t = begin; t < end; t += kTokens) {
    const int64_t count = std::min(kTokens, end - t);
    a.x.base = x.as<char>() + (offset + t * x.stride(2)) * size_of(x.dtype);
    a.x.dims = 1;
    a.x.shape[0] = count;
    a.x.strides[0] = x.stride(2);
    table().quantise_rows.fn(a, 0, count);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t token = kv.length + t + i;
      const int8_t* row = codes + i * a.k_blocks * 32;
      for (int64_t d = 0; d < kv.k_steps() * 4; ++d) {
        const uint8_t code = uint8_t(row[d] + 128);
        if (keys)
          put_code(kv, kv.k_block(slot, token / 32 * 32), token % 32, d, code);
        else
          put_code(kv, kv.v_block(slot, token, d / 32), d % 32, token % 64, code);
      }
      *kv.token_scales(keys ? kv.k_scales : kv.v_scales, slot, token) = scales[i * a.k_blocks];
    }
  }
}

// --- 4 bits ---

void read_row(const TensorView& x, int64_t offset, int64_t n, bf16* out) {
  const auto convert = [&](auto type) {
    const auto* from = x.as<const decltype(type)>() + offset;
    for (int64_t d = 0; d < n; ++d) out[d] = to_bf16(to_float(from[d]));
  };
  if (x.dtype == DType::f32) return convert(float{});
  if (x.dtype == DType::f16) return convert(f16{});
  std::memcpy(out, x.as<const bf16>() + offset, size_t(n) * 2);
}

void quantise_keys(const QuantisedKv& kv, int64_t slot, int64_t token, const float* x) {
  uint16_t* scales = kv.k_group(slot, token);
  for (int64_t d = 0; d < kv.head_dim; ++d) {
    const Range r = quantise_range(x + d, kv.group, kv.head_dim, [&](int64_t i, uint8_t code) {
      put_code(kv, kv.k_block(slot, (token + i) / 32 * 32), (token + i) % 32, d, code);
    });
    scales[d] = r.scale.bits;
    scales[padded16(kv.head_dim) + d] = r.minimum.bits;
  }
}

void quantise_values(const QuantisedKv& kv, int64_t slot, int64_t token, const float* x) {
  for (int64_t i = 0; i < kv.group; ++i)
    for (int64_t d = 0; d < kv.head_dim; d += kv.group) {
      const int64_t at = token + i;
      const Range r = quantise_range(
          x + i * kv.head_dim + d, std::min(kv.group, kv.head_dim - d), 1, [&](int64_t c, uint8_t code) {
            put_code(kv, kv.v_block(slot, at, (d + c) / 32), (d + c) % 32, at % 64, code);
          });
      uint16_t* scales = kv.v_group(slot, at, d);
      scales[at % 64] = r.scale.bits;
      scales[64 + at % 64] = r.minimum.bits;
    }
}

// Groups of tokens become codes up to `quantised`, the others the new tail.
void append_groups(const QuantisedKv& kv, const TensorView& x, bool keys, int64_t slot, int64_t quantised) {
  const int64_t d = kv.head_dim, length = kv.length + x.dim(2);
  const int64_t offset = slot / kv.kv_heads * x.stride(0) + slot % kv.kv_heads * x.stride(1);
  uint16_t* tail = keys ? kv.k_tail : kv.v_tail;
  const auto token_row = [&](int64_t token, bf16* out) {
    if (token < kv.length)
      std::memcpy(out, kv.tail_row(tail, slot, token), size_t(d) * 2);
    else
      read_row(x, offset + (token - kv.length) * x.stride(2), d, out);
  };
  float* group = static_cast<float*>(scratch(Scratch::panel, kv.group * d * 4 + d * 2));
  bf16* row = reinterpret_cast<bf16*>(group + kv.group * d);
  for (int64_t token = kv.quantised; token < quantised; token += kv.group) {
    for (int64_t i = 0; i < kv.group; ++i) {
      token_row(token + i, row);
      for (int64_t c = 0; c < d; ++c) group[i * d + c] = to_float(row[c]);
    }
    if (keys)
      quantise_keys(kv, slot, token, group);
    else
      quantise_values(kv, slot, token, group);
  }
  // In ascending order a row never lands on one that is still to be read.
  for (int64_t token = quantised; token < length; ++token) {
    token_row(token, row);
    std::memcpy(kv.tail_row(tail, slot, token - (quantised - kv.quantised)), row, size_t(d) * 2);
  }
}

}  // namespace

QuantisedKv quantised_kv(const char* op, const QuantisedKvInputs& in) {
  QuantisedKv kv;
  TW_EXPECT(in.bits == 4 || in.bits == 8, op,
            "QuantizedKV: bits must be 4 or 8, got " + std::to_string(in.bits));
  TW_EXPECT(in.group_size == 32 || in.group_size == 64 || in.group_size == 128, op,
            "QuantizedKV: group_size must be 32, 64 or 128, got " + std::to_string(in.group_size));
  TW_EXPECT(in.residual >= 0 && in.max_len >= 0 && in.head_dim >= 1 && in.k_codes.ndim >= 2, op,
            "QuantizedKV: residual and max_len must be >= 0 and head_dim >= 1");
  kv.bits = in.bits, kv.group = in.group_size, kv.max_len = in.max_len, kv.head_dim = in.head_dim;
  kv.batch = in.k_codes.shape[0], kv.kv_heads = in.k_codes.shape[1];
  const int64_t slots = kv.slots(), tokens = slots * kv.tiles();
  kv.k_codes = checked(op, "k_codes", in.k_codes, DType::u8, tokens * 2 * kv.k_block_bytes());
  kv.v_codes = checked(op, "v_codes", in.v_codes, DType::u8, tokens * kv.v_blocks() * kv.v_block_bytes());
  const bool wide = kv.bits == 8;
  const DType scale = wide ? DType::f32 : DType::bf16;
  const int64_t k_scales = wide ? tokens * 64 : slots * kv.groups() * 2 * padded16(kv.head_dim);
  kv.k_scales = checked(op, "k_scales", in.k_scales, scale, k_scales);
  kv.v_scales =
      checked(op, "v_scales", in.v_scales, scale, wide ? tokens * 64 : tokens * kv.channel_groups() * 128);
  kv.tail_rows = wide ? 0 : in.residual + kv.group - 1;
  const int64_t tail = slots * kv.tail_rows * kv.head_dim;
  kv.k_tail = reinterpret_cast<uint16_t*>(checked(op, "k_tail", in.k_tail, DType::bf16, tail));
  kv.v_tail = reinterpret_cast<uint16_t*>(checked(op, "v_tail", in.v_tail, DType::bf16, tail));
  const auto* counts = reinterpret_cast<const int64_t*>(checked(op, "counts", in.counts, DType::i64, 2));
  kv.length = counts[0], kv.quantised = counts[1];
  TW_EXPECT(
      kv.quantised >= 0 && kv.quantised <= kv.length && kv.length <= kv.max_len &&
          (wide ? kv.quantised == kv.length
                : kv.quantised % kv.group == 0 && kv.length - kv.quantised <= kv.tail_rows),
      op,
      "QuantizedKV: impossible counts " + std::to_string(kv.length) + ", " + std::to_string(kv.quantised));
  return kv;
}

void kv_append_quantised(const QuantisedKvInputs& in, const TensorView& k, const TensorView& v) {
  const QuantisedKv kv = quantised_kv(kOp, in);
  for (const auto* x : {&k, &v}) {
    const char* name = x == &k ? "k" : "v";
    expect_cpu(kOp, name, *x);
    expect_storage(kOp, name, *x);
    TW_EXPECT(x->ndim == 4 && x->dim(0) == kv.batch && x->dim(1) == kv.kv_heads && x->dim(2) == k.dim(2) &&
                  x->dim(3) == kv.head_dim,
              kOp,
              std::string(name) + " must be (batch, kv_heads, seq, head_dim) = (" + std::to_string(kv.batch) +
                  ", " + std::to_string(kv.kv_heads) + ", seq, " + std::to_string(kv.head_dim) +
                  ") with one seq for both, got " + shape_of(*x));
    expect_unit_stride(kOp, name, *x);
    for (const auto* cache :
         {&in.k_codes, &in.v_codes, &in.k_scales, &in.v_scales, &in.k_tail, &in.v_tail, &in.counts})
      TW_EXPECT(!overlaps(*cache, *x), kOp, "k and v must not share memory with the cache");
  }
  const int64_t seq = k.dim(2), length = kv.length + seq;
  TW_EXPECT(length <= kv.max_len, kOp,
            "QuantizedKV has room for max_len = " + std::to_string(kv.max_len) + " tokens and holds " +
                std::to_string(kv.length) + ", got " + std::to_string(seq) +
                " more; make a larger one with QuantizedKV.empty, or crop or reset it");
  record(kOp, table().quantise_rows.isa);
  int64_t* counts = in.counts.as<int64_t>();
  if (kv.bits == 8) {
    constexpr int64_t kGrain = 16384;  // values: less stays on the calling thread
    const int64_t tasks = 2 * kv.slots(), per_task = std::max<int64_t>(1, seq * kv.head_dim);
    parallel_ranges(tasks, (kGrain + per_task - 1) / per_task, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) append_codes(kv, i % 2 ? v : k, i % 2 == 0, i / 2, 0, seq);
    });
    counts[0] = counts[1] = length;
    return;
  }
  const int64_t whole = std::max<int64_t>(0, length - in.residual) / kv.group * kv.group;
  const int64_t quantised = std::max(kv.quantised, whole);
  constexpr int64_t kGrain = 4096;
  const int64_t per_task = std::max<int64_t>(1, (seq + quantised - kv.quantised) * kv.head_dim);
  parallel_ranges(2 * kv.slots(), (kGrain + per_task - 1) / per_task, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) append_groups(kv, i % 2 ? v : k, i % 2 == 0, i / 2, quantised);
  });
  counts[0] = length;
  counts[1] = quantised;
}

}  // namespace tilewright
