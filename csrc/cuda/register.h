// The submodule `cuda` of the compiled module.
#pragma once

#include <pybind11/pybind11.h>

namespace odysseus {

void register_cuda(pybind11::module_& module);

}  // namespace odysseus
