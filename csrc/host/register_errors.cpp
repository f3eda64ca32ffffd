// C++ errors as Python exceptions; std::invalid_argument and std::runtime_error are translated by pybind11 itself.
#include <pybind11/gil_safe_call_once.h>

#include "../common/check.h"
#include "register.h"

namespace py = pybind11;

namespace odysseus {
namespace {

PYBIND11_CONSTINIT py::gil_safe_call_once_and_store<py::object> no_space_type;

void raise_no_space(const NoSpaceError& error) {
  const py::object& type = no_space_type.get_stored();
  py::object exception = type(ENOSPC, error.what());
  exception.attr("needed") = error.needed;
  exception.attr("free") = error.free;
  PyErr_SetObject(type.ptr(), exception.ptr());
}

void raise_os_error(const OsError& error) {
  // Called with a number, OSError makes the subclass that belongs to it, such as FileNotFoundError.
  const py::object exception = py::reinterpret_borrow<py::object>(PyExc_OSError)(error.code, error.what());
  PyErr_SetObject(reinterpret_cast<PyObject*>(Py_TYPE(exception.ptr())), exception.ptr());
}

}  // namespace

void register_errors(py::module_& module) {
  no_space_type.call_once_and_store_result([&] {
    PyObject* type = PyErr_NewExceptionWithDoc("odysseus_kernels._C.NoSpace",
                                               "The segment's file system cannot back the bytes asked for.",
                                               PyExc_OSError, nullptr);
    if (type == nullptr) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(type);
  });
  module.add_object("NoSpace", no_space_type.get_stored());

  py::register_local_exception_translator([](std::exception_ptr pointer) {
    try {
      if (pointer) std::rethrow_exception(pointer);
    } catch (const NoSpaceError& error) {
      raise_no_space(error);
    } catch (const OsError& error) {
      raise_os_error(error);
    } catch (const NotPostedError& error) {
      PyErr_SetString(PyExc_LookupError, error.what());
    }
  });
}

}  // namespace odysseus
