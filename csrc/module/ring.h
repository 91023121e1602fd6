// The shared-memory all-reduce as a Python class.
#pragma once

#include <pybind11/pybind11.h>

namespace engine {

void bind_ring(pybind11::module_& m);

}  // namespace engine
