// GGUF's quantised tensor types: what each is made of, and how to read it. Layouts: ggml-common.h
// (llama.cpp).
#pragma once
#include <cstdint>
#include <string_view>

#include "ops/quant.h"

namespace tilewright {

struct GgufType {
  const char* name;  // GGUF's
  Codes codes;
  int group;  // columns that share a scale
  Offset offset;
  Scale scale;
  int columns, bytes;  // of a block in the file
  // Columns [32 * part, 32 * part + 32) of a block. Any bytes are a valid block.
  void (*read)(const uint8_t* block, int part, Chunk& chunk);
};

struct GgufTypes {
  const GgufType *first, *last;
  const GgufType* begin() const { return first; }
  const GgufType* end() const { return last; }
};
GgufTypes gguf_types();

// nullptr where there is no such type.
const GgufType* find_gguf_type(std::string_view name);

}  // namespace tilewright
