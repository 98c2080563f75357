// The tile instructions in C++: see amx_emulated.cpp. Included by amx.h only.
#pragma once
#include <cstdint>

namespace tilewright::emulated {

void tile_config(const void* config);
void tile_release();
void tile_load(int t, const void* p, int64_t stride);
void tile_store(int t, void* p, int64_t stride);
void tile_zero(int t);
void tile_dot_bf16(int c, int a, int b);
void tile_dot_int8(int c, int a, int b, bool signed_a, bool signed_b);

}  // namespace tilewright::emulated
