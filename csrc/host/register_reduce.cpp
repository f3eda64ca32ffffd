#include <pybind11/stl.h>

#include <cstring>

#include "../common/check.h"
#include "reduce.h"
#include "register.h"

namespace py = pybind11;
using namespace pybind11::literals;

namespace odysseus {
namespace {

void reduce_addresses(std::uintptr_t out, const std::string& out_dtype, const std::vector<std::uintptr_t>& sources,
                      const std::vector<std::string>& source_dtypes, std::size_t count) {
  ODY_CHECK_VALUE(sources.size(), ==, source_dtypes.size(), "each source has one dtype");
  const Operand target{out, parse_dtype(out_dtype)};
  std::vector<Operand> operands;
  operands.reserve(sources.size());
  for (std::size_t i = 0; i < sources.size(); ++i) operands.push_back({sources[i], parse_dtype(source_dtypes[i])});
  check_reduce(target, operands, count);
  const py::gil_scoped_release release;
  reduce(target, operands, count);
}

void copy(std::uintptr_t dst, std::uintptr_t src, std::size_t nbytes) {
  if (nbytes == 0) return;
  ODY_CHECK_VALUE(dst, !=, std::uintptr_t{0}, "the destination is a null pointer");
  ODY_CHECK_VALUE(src, !=, std::uintptr_t{0}, "the source is a null pointer");
  const std::uintptr_t distance = dst < src ? src - dst : dst - src;
  ODY_CHECK_VALUE(distance, >=, nbytes, "source and destination overlap");
  const py::gil_scoped_release release;
  std::memcpy(reinterpret_cast<void*>(dst), reinterpret_cast<const void*>(src), nbytes);
}

}  // namespace

void register_reduce(py::module_& module) {
  module.def("reduce", &reduce_addresses, "out"_a, "out_dtype"_a, "sources"_a, "source_dtypes"_a, "count"_a);
  module.def("copy", &copy, "dst"_a, "src"_a, "nbytes"_a);
  module.def("simd", &simd_name);
  module.def("use_simd", &use_simd, "name"_a);
}

}  // namespace odysseus
