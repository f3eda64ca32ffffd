#include <pybind11/stl.h>

#include "register.h"
#include "symmetric_host.h"

namespace py = pybind11;
using namespace pybind11::literals;

namespace odysseus {
namespace {

py::tuple to_python(const WaitOutcome& outcome) { return py::make_tuple(outcome.status, outcome.rank); }

void check_signals() {
  if (PyErr_CheckSignals() != 0) throw py::error_already_set();
}

py::tuple run(Wait wait) {
  if (wait.satisfied()) return to_python(wait.success());
  while (true) {
    std::optional<WaitOutcome> outcome;
    {
      const py::gil_scoped_release release;
      outcome = wait.step();
    }
    if (outcome) return to_python(*outcome);
    check_signals();
  }
}

void reserve(const SymmetricHost& host, int window, std::uint64_t nbytes) {
  const std::shared_ptr<Group> group = host.group();
  while (true) {
    bool done;
    {
      const py::gil_scoped_release release;
      done = SymmetricHost::reserve(*group, window, nbytes);
    }
    if (done) return;
    check_signals();
  }
}

// Text of another process: whatever bytes it holds, it must not become a decoding error here.
py::str to_text(const std::string& text) {
  PyObject* decoded = PyUnicode_DecodeUTF8(text.data(), static_cast<Py_ssize_t>(text.size()), "replace");
  if (decoded == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::str>(decoded);
}

void register_window(py::module_& module) {
  py::class_<Window>(module, "Window", py::buffer_protocol())
      .def_property_readonly("address", [](const Window& self) { return reinterpret_cast<std::uintptr_t>(self.data); })
      .def_property_readonly("nbytes", [](const Window& self) { return self.bytes; })
      .def("__len__", [](const Window& self) { return self.bytes; })
      .def_buffer([](Window& self) {
        return py::buffer_info(reinterpret_cast<std::uint8_t*>(self.data), static_cast<py::ssize_t>(self.bytes));
      });
}

}  // namespace

void register_symmetric_host(py::module_& module) {
  module.attr("WINDOWS") = kWindows;
  module.attr("CELLS") = kCells;
  module.attr("DESCRIPTORS") = kDescriptors;
  module.attr("TEXT_BYTES") = kTextBytes - 1;
  module.attr("REASON_BYTES") = kReasonBytes - 1;
  register_window(module);

  py::class_<SymmetricHost>(module, "SymmetricHost")
      .def(py::init<int, int, const std::string&, std::uint64_t, std::uint64_t>(), "rank"_a, "world"_a, "directory"_a,
           "window_bytes"_a, "nonce"_a)
      .def_property_readonly("rank", &SymmetricHost::rank)
      .def_property_readonly("world", &SymmetricHost::world)
      .def_property_readonly("window_bytes", &SymmetricHost::window_bytes)
      .def_property_readonly("nonce", &SymmetricHost::nonce)
      .def_property_readonly("closed", &SymmetricHost::closed)
      .def_property_readonly("path", &SymmetricHost::path)
      .def_property("spin_us", &SymmetricHost::spin_us, &SymmetricHost::set_spin_us)
      .def("attach", &SymmetricHost::attach, "paths"_a)
      .def("reserve", &reserve, "window"_a, "nbytes"_a)
      .def("reserved", &SymmetricHost::reserved, "window"_a)
      .def("window", &SymmetricHost::window, "rank"_a, "window"_a)
      .def("set_ready", &SymmetricHost::set_ready, "window"_a, "cell"_a, "value"_a)
      .def("set_done", &SymmetricHost::set_done, "owner"_a, "window"_a, "cell"_a, "value"_a)
      .def(
          "wait_ready",
          [](const SymmetricHost& self, int owner, int window, int cell, std::uint64_t value, double timeout_s) {
            return run(self.wait_ready(owner, window, cell, value, timeout_s));
          },
          "owner"_a, "window"_a, "cell"_a, "value"_a, "timeout_s"_a)
      .def(
          "wait_done",
          [](const SymmetricHost& self, int reader, int window, int cell, std::uint64_t value, double timeout_s) {
            return run(self.wait_done(reader, window, cell, value, timeout_s));
          },
          "reader"_a, "window"_a, "cell"_a, "value"_a, "timeout_s"_a)
      .def(
          "wait_posted",
          [](const SymmetricHost& self, int peer, std::uint64_t seq, double timeout_s) {
            return run(self.wait_posted(peer, seq, timeout_s));
          },
          "peer"_a, "seq"_a, "timeout_s"_a)
      .def("ready", &SymmetricHost::ready, "owner"_a, "window"_a, "cell"_a)
      .def("done", &SymmetricHost::done, "owner"_a, "reader"_a, "window"_a, "cell"_a)
      .def("post", &SymmetricHost::post, "seq"_a, "hash"_a, "text"_a)
      .def("posted", &SymmetricHost::posted, "peer"_a)
      .def(
          "descriptor",
          [](const SymmetricHost& self, int peer, std::uint64_t seq) {
            const auto found = self.descriptor(peer, seq);
            return py::make_tuple(found.first, to_text(found.second));
          },
          "peer"_a, "seq"_a)
      .def("set_step", &SymmetricHost::set_step, "number"_a)
      .def("step", &SymmetricHost::step, "rank"_a)
      .def("fail", &SymmetricHost::fail, "text"_a)
      .def("leave", &SymmetricHost::leave, "text"_a)
      .def(
          "reason", [](const SymmetricHost& self, int rank) { return to_text(self.reason(rank)); }, "rank"_a)
      .def("alive", &SymmetricHost::alive, "rank"_a)
      .def("close", &SymmetricHost::close);
}

}  // namespace odysseus
