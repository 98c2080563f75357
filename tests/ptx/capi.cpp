// The C interface of the Python driver (machine.py). A function that fails returns null or -1; ptx_error says
// why.
#include <cstring>

#include "library.h"

namespace {

thread_local std::string error_text, answer;

template <class F>
auto guarded(F f) -> decltype(f()) {
  try {
    return f();
  } catch (const std::exception& e) {
    error_text = e.what();
  }
  if constexpr (std::is_pointer_v<decltype(f())>)
    return nullptr;
  else
    return -1;
}

const char* say(std::string text) {
  answer = std::move(text);
  return answer.c_str();
}

}  // namespace

#define PTX_API extern "C" __attribute__((visibility("default")))

PTX_API const char* ptx_error() { return error_text.c_str(); }

PTX_API ptx::Library* ptx_load(const char* text) {
  return guarded([&] { return new ptx::Library(text); });
}
PTX_API void ptx_unload(ptx::Library* library) { delete library; }

PTX_API const char* ptx_kernels(ptx::Library* library) {
  std::string out = "[";
  for (const ptx::Function& f : library->module.functions)
    if (f.is_entry) out += (out.size() > 1 ? ", " : "") + ptx::quoted(f.name);
  return say(out + "]");
}

PTX_API int64_t ptx_symbol(ptx::Library* library, const char* name) {
  return guarded([&] { return static_cast<int64_t>(library->symbol(name)); });
}

PTX_API ptx::Kernel* ptx_kernel(ptx::Library* library, const char* name) {
  return guarded([&] { return &library->kernel(name); });
}

// {"name", "params": [[at, size], ...], "param_bytes", "static_shared", "instructions": [[line, text, source,
// function, is_sync], ...]}
PTX_API const char* ptx_describe(ptx::Kernel* k) {
  return guarded([&] {
    const ptx::Program& p = *k->program;
    std::string out = "{\"name\": " + ptx::quoted(p.name) + ", \"params\": [";
    for (const auto& param : p.functions.front().params)
      out += (out.back() == '[' ? "[" : ", [") + std::to_string(param.at) + ", " +
             std::to_string(param.size) + "]";
    out += "], \"param_bytes\": " + std::to_string(p.param_bytes) +
           ", \"static_shared\": " + std::to_string(ptx::static_shared(p)) + ", \"instructions\": [";
    for (uint32_t pc = 0; pc < p.code.size(); ++pc) {
      const ptx::Inst& i = p.code[pc];
      const std::string source = i.source < 0 ? "" : p.module->sources[static_cast<size_t>(i.source)];
      out += (pc ? ", [" : "[") + std::to_string(i.line) + ", " + ptx::quoted(p.text(i)) + ", " +
             ptx::quoted(source) + ", " + ptx::quoted(p.function_at(pc).name) + ", " +
             (i.is_sync ? "true" : "false") + "]";
    }
    return say(out + "]}");
  });
}

PTX_API int ptx_delete(ptx::Kernel* k, uint32_t pc, int deleted) {
  return guarded([&] {
    if (pc >= k->program->code.size()) throw ptx::Error("there is no instruction " + std::to_string(pc));
    k->program->code[pc].deleted = deleted;
    return 0;
  });
}

struct PtxOptions {
  uint64_t seed, max_warp_instructions;
  int32_t resident, statistics;
};

PTX_API int ptx_launch(ptx::Kernel* k, const uint32_t* grid, const uint32_t* block, uint64_t shared,
                       const uint8_t* params, uint64_t param_bytes, const PtxOptions* o) {
  return guarded([&] {
    const ptx::Options options = {o->seed, o->resident, o->max_warp_instructions, o->statistics != 0};
    ptx::launch(*k, grid, block, shared, std::vector<uint8_t>(params, params + param_bytes), options);
    return 0;
  });
}

PTX_API const char* ptx_report(ptx::Kernel* k) { return say(k->report.json()); }

PTX_API int ptx_memory_add(uint64_t begin, uint64_t bytes, int defined, const char* name) {
  return guarded([&] {
    ptx::Region& r = ptx::device().add(begin, bytes, true, name);
    if (bytes) r.undefine(begin, bytes, !defined);
    return 0;
  });
}
PTX_API int ptx_memory_remove(uint64_t begin) {
  return guarded([&] {
    ptx::device().remove(begin);
    return 0;
  });
}
// How many bytes of [begin, begin + bytes) hold an undefined bit.
PTX_API int64_t ptx_memory_undefined(uint64_t begin, uint64_t bytes) {
  return guarded([&]() -> int64_t {
    ptx::Region* r = ptx::device().find(begin);
    if (!r || begin + bytes > r->end) throw ptx::Error("this memory is not allocated on the device");
    const uint8_t* shadow = r->shadow_at(begin);
    int64_t n = 0;
    for (uint64_t k = 0; shadow && k < bytes; ++k) n += shadow[k] != 0;
    return n;
  });
}
