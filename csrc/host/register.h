// One registration function for each area of the module.
#pragma once

#include <pybind11/pybind11.h>

namespace odysseus {

void register_errors(pybind11::module_& module);
void register_reduce(pybind11::module_& module);
void register_symmetric_host(pybind11::module_& module);

}  // namespace odysseus
