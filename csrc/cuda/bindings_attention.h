// The part of the module tilewright._cuda that is about attention.
#pragma once
#include <pybind11/pybind11.h>

void bind_attention(pybind11::module_& m);
