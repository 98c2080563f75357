// A quantised KV cache from its tensors.
#pragma once
#include "cpu/quantised_kv.h"
#include "ops.h"

namespace tilewright {

// Checks that every tensor has the size that the description asks for.
QuantisedKv quantised_kv(const char* op, const QuantisedKvInputs& in);

}  // namespace tilewright
