// The only place that dispatches: for every op the function of the strongest level that is compiled for it
// and that active() allows.
#pragma once
#include <atomic>

#include "cpu/isa.h"
#include "cpu/kernels.h"

namespace tilewright {

template <class Fn>
struct Entry {
  Fn fn;
  Isa isa;
};

struct Table {
  Entry<NormKernel> norm;
  Entry<QuantiseKernel> quantise_rows;
  Entry<LinearKernel> linear_int8, linear_f32;
  Entry<PrepareKernel> prepare_f32;
  // Absent (fn == nullptr) below avx512bf16: x is rounded to bf16 and linear_f32 runs.
  Entry<PrepareKernel> prepare_bf16;
  Entry<LinearKernel> linear_bf16;
  Entry<AttentionKernel> attention_pack, attention_prefill, attention_decode, attention_merge;
  Entry<AttentionKernel> attention_pack_quantised, attention_decode_quantised;
  Entry<AttentionGradKernel> attention_grad_rows, attention_grad_pack, attention_grad_keys, attention_grad_q;
  Entry<RopeKernel> rope;
  Entry<ActMulKernel> act_mul;
  Entry<KvAppendKernel> kv_append;
  Entry<SampleMaxKernel> sample_max;
  Entry<SampleGatherKernel> sample_gather;
  Entry<SampleWeightsKernel> sample_weights;
  Entry<PeakKernel> ceiling_fp32, ceiling_bf16, ceiling_int8;
  Entry<ReadKernel> ceiling_read;
};

const Table& table();

// The implementation that last served an op, for last_impl(). Names are string literals.
void record(const char* op, const char* implementation);
inline void record(const char* op, Isa isa) { record(op, name_of(isa)); }
const char* last_implementation(const char* op);  // nullptr: never ran

}  // namespace tilewright
