#include <pybind11/stl.h>

#include <cstddef>
#include <map>
#include <string>

#include "copy.h"
#include "program.h"
#include "register.h"
#include "rehearsal.h"
#include "runtime.h"
#include "standalone.h"

namespace py = pybind11;
using namespace pybind11::literals;

namespace odysseus {
namespace {

using Release = py::call_guard<py::gil_scoped_release>;

void register_recording(py::module_& module) {
  py::class_<Recording>(module, "Recording")
      .def(py::init<>())
      .def("copy", &Recording::copy, "stream"_a, "dst"_a, "src"_a, "row_bytes"_a, "rows"_a = 1, "dst_pitch"_a = 0,
           "src_pitch"_a = 0, "over_link"_a = false)
      .def("wait", &Recording::wait, "stream"_a, "epoch"_a, "words"_a, "values"_a, "tag"_a)
      .def("signal", &Recording::signal, "stream"_a, "epoch"_a, "words"_a, "values"_a)
      .def("advance", &Recording::advance, "stream"_a, "epoch"_a)
      .def(
          "reduce",
          [](Recording& self, std::int64_t stream, Address out, const std::string& out_dtype,
             const std::vector<Address>& sources, const std::string& source_dtype, std::int64_t count,
             std::int64_t rows, std::int64_t out_pitch, const std::optional<std::vector<std::int64_t>>& source_pitches,
             const std::optional<Address>& epoch, const std::optional<std::vector<Address>>& words,
             const std::optional<std::vector<std::int64_t>>& values, std::int64_t tag, std::int64_t beside) {
            self.reduce(stream, out, out_dtype, sources, source_dtype, count, rows, out_pitch, source_pitches,
                        {epoch, words, values, tag}, beside);
          },
          "stream"_a, "out"_a, "out_dtype"_a, "sources"_a, "source_dtype"_a, "count"_a, "rows"_a = 1,
          "out_pitch"_a = 0, "source_pitches"_a = py::none(), "epoch"_a = py::none(), "words"_a = py::none(),
          "values"_a = py::none(), "tag"_a = 0, "beside"_a = 0)
      .def("reduce_multicast", &Recording::reduce_multicast, "stream"_a, "out"_a, "multicast"_a, "dtype"_a, "count"_a,
           "rows"_a = 1, "out_pitch"_a = 0, "beside"_a = 0)
      .def("store_multicast", &Recording::store_multicast, "stream"_a, "multicast"_a, "src"_a, "row_bytes"_a,
           "rows"_a = 1, "src_pitch"_a = 0, "beside"_a = 0)
      .def("record", &Recording::record, "stream"_a, "event"_a)
      .def("depend", &Recording::depend, "stream"_a, "event"_a)
      .def(
          "check_run",
          [](const Recording& self, std::int64_t first, std::int64_t last, const std::vector<std::uint64_t>& streams,
             const std::vector<std::uint64_t>& bases,
             double timeout_s) { self.check_run(first, last, streams.size(), bases, timeout_s); },
          "first"_a, "last"_a, "streams"_a, "bases"_a, "timeout_s"_a)
      .def("__len__", &Recording::size);
}

// Enqueues all operations, in order; where `stops[i]` of them are enqueued, callbacks[i] is called, unless it is None.
// All arguments are checked before the first is enqueued, and the GIL is held for callbacks alone.
template <class Runnable>
void play(Runnable& self, const std::vector<std::int64_t>& stops, const std::vector<py::object>& callbacks,
          const std::vector<std::uint64_t>& streams, const std::vector<std::uint64_t>& bases, double timeout_s) {
  const auto end = static_cast<std::int64_t>(self.size());
  ODY_CHECK_VALUE(stops.size(), ==, callbacks.size(), "each stop has one callback, or None");
  std::int64_t first = 0;
  for (const std::int64_t stop : stops) {
    ODY_CHECK_VALUE(stop, >=, first, "a stop is not before the one ahead of it");
    ODY_CHECK_VALUE(stop, <=, end, "a stop is a number of operations");
    first = stop;
  }
  std::unique_ptr<Pass> pass;
  {
    const py::gil_scoped_release release;
    pass = self.begin(0, end, streams, bases, timeout_s);
  }
  first = 0;
  const auto enqueue_to = [&](std::int64_t stop) {
    if (stop == first) return;
    const py::gil_scoped_release release;
    pass->enqueue(first, stop);
    first = stop;
  };
  for (std::size_t i = 0; i < stops.size(); ++i) {
    if (callbacks[i].is_none()) continue;  // what is before it goes together with what follows
    enqueue_to(stops[i]);
    callbacks[i]();
  }
  enqueue_to(end);
}

void register_rehearsal(py::module_& module) {
  py::class_<Rehearsal, Recording>(module, "Rehearsal")
      .def(py::init<bool>(), "lists"_a = true)
      .def("run", &Rehearsal::run, "first"_a, "last"_a, "streams"_a, "bases"_a, "timeout_s"_a, Release())
      .def("play", &play<Rehearsal>, "stops"_a, "callbacks"_a, "streams"_a, "bases"_a, "timeout_s"_a)
      .def_property_readonly("launched", &Rehearsal::launched)
      .def("take_launches",
           [](Rehearsal& self) {
             py::list launches;
             for (const Launch& launch : self.take_launches()) {
               launches.append(py::make_tuple(launch.kind, launch.stream, launch.addresses, launch.values));
             }
             return launches;
           })
      .def("close", [](Rehearsal&) {});
}

void register_program(py::module_& module) {
  py::class_<Control, std::shared_ptr<Control>>(module, "Control")
      .def(py::init<int, std::uint64_t>(), "device"_a, "aborted"_a)
      .def("abort", &Control::abort, "code"_a)
      .def_property_readonly(
          "block", [](const Control& self) { return reinterpret_cast<std::uint64_t>(self.device_block()); })
      .def("error",
           [](const Control& self) -> py::object {
             const std::optional<WaitError> error = self.error();
             if (!error) return py::none();
             const auto& [code, tag, index, expected, seen] = *error;
             return py::make_tuple(code, tag, index, expected, seen);
           })
      .def("close", &Control::close, Release());
  py::class_<Program, Recording>(module, "Program")
      .def(py::init<std::shared_ptr<Control>, int, double>(), "control"_a, "device"_a, "link"_a = 0.0)
      .def("run", &Program::run, "first"_a, "last"_a, "streams"_a, "bases"_a, "timeout_s"_a, Release())
      .def("play", &play<Program>, "stops"_a, "callbacks"_a, "streams"_a, "bases"_a, "timeout_s"_a)
      .def("close", &Program::close, Release());
}

Share parse_share(const std::string& name) {
  if (name == "device") return Share::kDevice;
  if (name == "beside") return Share::kBeside;
  if (name == "waiting") return Share::kWaiting;
  throw std::invalid_argument(concat("share: expected device, beside or waiting, got ", name));
}

// Places in ControlBlock in words of 32 bits, where kernels of others than this module find them.
std::map<std::string, std::size_t> control_words() {
  constexpr std::size_t word = sizeof(std::uint32_t);
  return {{"abort", offsetof(ControlBlock, abort) / word},       {"claimed", offsetof(ControlBlock, claimed) / word},
          {"recorded", offsetof(ControlBlock, recorded) / word}, {"code", offsetof(ControlBlock, code) / word},
          {"tag", offsetof(ControlBlock, tag) / word},           {"index", offsetof(ControlBlock, index) / word},
          {"expected", offsetof(ControlBlock, expected) / word}, {"seen", offsetof(ControlBlock, seen) / word}};
}

// What kernels compute, and how work is cut up, on the host; for tests.
void register_host_side(py::module_& module) {
  module.def("word_of", &word_of, "epoch"_a, "value"_a);
  module.def("reached", &reached, "seen"_a, "expected"_a);
  module.def("nanoseconds", &nanoseconds, "seconds"_a);
  module.def("control_words", &control_words);
  module.def(
      "link_pieces",
      [](std::size_t row_bytes, std::size_t rows, std::size_t dst_pitch, std::size_t src_pitch, std::size_t piece) {
        py::list pieces;
        for (const CopyPart& part : link_pieces({row_bytes, rows, dst_pitch, src_pitch}, piece)) {
          pieces.append(py::make_tuple(part.dst_offset, part.src_offset, part.row_bytes, part.rows));
        }
        return pieces;
      },
      "row_bytes"_a, "rows"_a, "dst_pitch"_a, "src_pitch"_a, "piece"_a = kLinkPiece);
  module.def(
      "reduce_grid",
      [](std::uint64_t work, const std::string& share, int multiprocessors, int cap) {
        const Share kind = parse_share(share);
        const Grid grid = reduce_grid(work, kind, multiprocessors, cap);
        return py::make_tuple(grid.blocks, grid.threads);
      },
      "work"_a, "share"_a, "multiprocessors"_a, "cap"_a = 0);
  module.def(
      "reduce_layout",
      [](std::uint64_t out, const std::string& out_dtype, const std::vector<std::uint64_t>& sources,
         const std::string& source_dtype, std::int64_t count, std::int64_t rows, std::int64_t out_pitch,
         const std::vector<std::int64_t>& source_pitches) {
        const ReduceTask task =
            reduce_layout(out, out_dtype, sources, source_dtype, count, rows, out_pitch, source_pitches);
        return py::make_tuple(task.rows, task.head, task.vectors, task.tail);
      },
      "out"_a, "out_dtype"_a, "sources"_a, "source_dtype"_a, "count"_a, "rows"_a, "out_pitch"_a, "source_pitches"_a);
  module.def("reduce_on_host", &reduce_on_host, "out"_a, "out_dtype"_a, "sources"_a, "source_dtype"_a, "count"_a,
             "rows"_a, "out_pitch"_a, "source_pitches"_a, "workers"_a, Release());
}

}  // namespace

void register_cuda(py::module_& module) {
  py::module_ cuda = module.def_submodule("cuda", "Streams, signals, copies and reductions of a CUDA device.");
  cuda.def("why_unavailable", &why_no_cuda, Release());
  cuda.def("why_no_batch_copies", &why_no_batch_copies, Release());
  cuda.def("small_kernels", &small_kernels, "device"_a, Release());
  cuda.def("multimem_supported", &multicasts, "device"_a, Release());
  cuda.def("reduce", &reduce_on_device, "stream"_a, "out"_a, "out_dtype"_a, "sources"_a, "source_dtype"_a, "count"_a,
           "max_blocks"_a = 0, Release());
  cuda.def("multimem_reduce", &multimem_reduce, "stream"_a, "out"_a, "multicast"_a, "dtype"_a, "count"_a,
           "max_blocks"_a = 0, Release());
  register_recording(cuda);
  register_program(cuda);
  py::module_ host_side = cuda.def_submodule("host_side", "What kernels compute, on the host; for tests.");
  register_host_side(host_side);
  register_rehearsal(host_side);
}

}  // namespace odysseus
