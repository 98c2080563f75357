#include "cpu/table.h"

#include <cstring>
#include <initializer_list>
#include <mutex>

namespace tilewright {
namespace {

template <class Fn>
Entry<Fn> pick(std::initializer_list<Entry<Fn>> weakest_first) {
  Entry<Fn> best = *weakest_first.begin();
  for (const auto& e : weakest_first)
    if (e.isa <= active() && has(e.isa)) best = e;
  return best;
}

Table make() {
  Table t;
  t.norm = pick<NormKernel>({{norm_scalar, Isa::scalar}, {norm_avx2, Isa::avx2}, {norm_avx512, Isa::avx512}});
  t.quantise_rows = pick<QuantiseKernel>({{quantise_rows_scalar, Isa::scalar},
                                          {quantise_rows_avx2, Isa::avx2},
                                          {quantise_rows_avx512, Isa::avx512}});
  t.linear_int8 = pick<LinearKernel>({{linear_int8_scalar, Isa::scalar},
                                      {linear_int8_avx2, Isa::avx2},
                                      {linear_int8_avxvnni, Isa::avxvnni},
                                      {linear_int8_avx512, Isa::avx512},
                                      {linear_int8_amx, Isa::amx}});
  t.prepare_f32 = pick<PrepareKernel>(
      {{prepare_f32_scalar, Isa::scalar}, {prepare_f32_avx2, Isa::avx2}, {prepare_f32_avx512, Isa::avx512}});
  t.linear_f32 = pick<LinearKernel>(
      {{linear_f32_scalar, Isa::scalar}, {linear_f32_avx2, Isa::avx2}, {linear_f32_avx512, Isa::avx512}});
  t.prepare_bf16 = pick<PrepareKernel>({{nullptr, Isa::scalar}, {prepare_bf16_avx512bf16, Isa::avx512bf16}});
  t.linear_bf16 = pick<LinearKernel>(
      {{nullptr, Isa::scalar}, {linear_bf16_avx512bf16, Isa::avx512bf16}, {linear_bf16_amx, Isa::amx}});
#define TW_ATTENTION(op, Kernel, ...)              \
  t.op = pick<Kernel>({{op##_scalar, Isa::scalar}, \
                       {op##_avx2, Isa::avx2},     \
                       {op##_avx512, Isa::avx512}, \
                       {op##_avx512bf16, Isa::avx512bf16} __VA_OPT__(, ) __VA_ARGS__});
  TW_ATTENTION(attention_pack, AttentionKernel, {attention_pack_amx, Isa::amx})
  TW_ATTENTION(attention_prefill, AttentionKernel, {attention_prefill_amx, Isa::amx})
  TW_ATTENTION(attention_decode, AttentionKernel)
  TW_ATTENTION(attention_merge, AttentionKernel)
  TW_ATTENTION(attention_pack_quantised, AttentionKernel)
  TW_ATTENTION(attention_decode_quantised, AttentionKernel)
  TW_ATTENTION(attention_grad_rows, AttentionGradKernel)
  TW_ATTENTION(attention_grad_pack, AttentionGradKernel)
  TW_ATTENTION(attention_grad_keys, AttentionGradKernel)
  TW_ATTENTION(attention_grad_q, AttentionGradKernel)
#undef TW_ATTENTION
  t.rope = pick<RopeKernel>({{rope_scalar, Isa::scalar}, {rope_avx2, Isa::avx2}, {rope_avx512, Isa::avx512}});
  t.act_mul = pick<ActMulKernel>(
      {{act_mul_scalar, Isa::scalar}, {act_mul_avx2, Isa::avx2}, {act_mul_avx512, Isa::avx512}});
  t.kv_append = pick<KvAppendKernel>(
      {{kv_append_scalar, Isa::scalar}, {kv_append_avx2, Isa::avx2}, {kv_append_avx512, Isa::avx512}});
  t.sample_max = pick<SampleMaxKernel>(
      {{sample_max_scalar, Isa::scalar}, {sample_max_avx2, Isa::avx2}, {sample_max_avx512, Isa::avx512}});
  t.sample_gather = pick<SampleGatherKernel>({{sample_gather_scalar, Isa::scalar},
                                              {sample_gather_avx2, Isa::avx2},
                                              {sample_gather_avx512, Isa::avx512}});
  t.sample_weights = pick<SampleWeightsKernel>({{sample_weights_scalar, Isa::scalar},
                                                {sample_weights_avx2, Isa::avx2},
                                                {sample_weights_avx512, Isa::avx512}});
#define TW_CEILING(op, Kernel)                       \
  t.op = pick<Kernel>({{op##_scalar, Isa::scalar},   \
                       {op##_avx2, Isa::avx2},       \
                       {op##_avxvnni, Isa::avxvnni}, \
                       {op##_avx512, Isa::avx512},   \
                       {op##_avx512bf16, Isa::avx512bf16}});
  TW_CEILING(ceiling_fp32, PeakKernel)
  TW_CEILING(ceiling_bf16, PeakKernel)
  TW_CEILING(ceiling_int8, PeakKernel)
  TW_CEILING(ceiling_read, ReadKernel)
#undef TW_CEILING
  return t;
}

struct Record {
  const char* op;
  std::atomic<const char*> implementation;
};
constexpr int kMaxOps = 64;
Record records[kMaxOps];
std::atomic<int> n_records{0};
std::mutex records_mutex;

Record* find(const char* op) {
  const int n = n_records.load(std::memory_order_acquire);
  for (int i = 0; i < n; ++i)
    if (records[i].op == op || !std::strcmp(records[i].op, op)) return &records[i];
  return nullptr;
}

}  // namespace

const Table& table() {
  static const Table t = make();
  return t;
}

void record(const char* op, const char* implementation) {
  Record* r = find(op);
  if (!r) {
    std::lock_guard<std::mutex> guard(records_mutex);
    r = find(op);
    if (!r) {
      const int n = n_records.load(std::memory_order_relaxed);
      if (n == kMaxOps) return;
      records[n].op = strdup(op);  // lives as long as the process
      r = &records[n];
      n_records.store(n + 1, std::memory_order_release);
    }
  }
  r->implementation.store(implementation, std::memory_order_relaxed);
}

const char* last_implementation(const char* op) {
  const Record* r = find(op);
  return r ? r->implementation.load(std::memory_order_relaxed) : nullptr;
}

}  // namespace tilewright
