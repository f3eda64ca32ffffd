#include "standalone.h"

#include <algorithm>

#include "../host/reduce.h"
#include "recording.h"
#include "runtime.h"
#include "tasks.h"

namespace odysseus {
namespace {

// A reduction as a recording checks it: bases are the addresses themselves.
struct Checked {
  ReduceTask task;
  DType source_dtype;
  DType out_dtype;
};

Checked check(std::uint64_t out, const std::string& out_dtype, const std::vector<std::uint64_t>& sources,
              const std::string& source_dtype, std::int64_t count, std::int64_t rows, std::int64_t out_pitch,
              const std::vector<std::int64_t>& source_pitches) {
  std::vector<Address> addresses;
  std::vector<std::uint64_t> bases{out};
  for (const std::uint64_t source : sources) {
    addresses.push_back({static_cast<std::int64_t>(bases.size()), 0});
    bases.push_back(source);
  }
  Recording recording;
  recording.reduce(0, {0, 0}, out_dtype, addresses, source_dtype, count, rows, out_pitch, source_pitches, {});
  if (count > 0 && rows > 0) recording.check_run(0, 1, 1, bases, 0);
  return {reduce_task(std::get<ReduceOperation>(recording.operations()[0].what), bases), parse_dtype(source_dtype),
          parse_dtype(out_dtype)};
}

}  // namespace

void reduce_on_device(std::uint64_t stream, std::uint64_t out, const std::string& out_dtype,
                      const std::vector<std::uint64_t>& sources, const std::string& source_dtype, std::int64_t count,
                      std::int64_t max_blocks) {
  ODY_CHECK_VALUE(max_blocks, >=, std::int64_t{0}, "0 for as many as fill the device");
  const std::vector<std::int64_t> dense(sources.size(), 0);
  const Checked reduction = check(out, out_dtype, sources, source_dtype, count, 1, 0, dense);
  if (count == 0) return;
  const int device = device_of(out, "out");
  load_kernels(device);
  const DeviceGuard guard(device);
  const Grid grid = reduce_grid(accesses(reduction.task), Share::kDevice, multiprocessors(device),
                                static_cast<int>(std::min<std::int64_t>(max_blocks, 1 << 20)));
  ODY_CUDA(launch_reduce(reduction.task, WaitTask{}, reduction.source_dtype, reduction.out_dtype, grid,
                         reinterpret_cast<cudaStream_t>(stream)),
           "adding ", sources.size(), " sources of ", count, " elements");
}

void reduce_on_host(std::uint64_t out, const std::string& out_dtype, const std::vector<std::uint64_t>& sources,
                    const std::string& source_dtype, std::int64_t count, std::int64_t rows, std::int64_t out_pitch,
                    const std::vector<std::int64_t>& source_pitches, std::int64_t workers) {
  ODY_CHECK_VALUE(workers, >=, std::int64_t{1}, "threads");
  const Checked reduction = check(out, out_dtype, sources, source_dtype, count, rows, out_pitch, source_pitches);
  if (count == 0 || rows == 0) return;
  const auto threads = static_cast<std::uint64_t>(workers);
  with_types(reduction.source_dtype, reduction.out_dtype, [&](auto from, auto to) {
    for (std::uint64_t worker = 0; worker < threads; ++worker) {
      if (sources.size() <= kFewSources) {
        few_sources<decltype(from), decltype(to)>(reduction.task, worker, threads);
      } else {
        many_sources<decltype(from), decltype(to)>(reduction.task, worker, threads);
      }
    }
  });
}

ReduceTask reduce_layout(std::uint64_t out, const std::string& out_dtype, const std::vector<std::uint64_t>& sources,
                         const std::string& source_dtype, std::int64_t count, std::int64_t rows,
                         std::int64_t out_pitch, const std::vector<std::int64_t>& source_pitches) {
  return check(out, out_dtype, sources, source_dtype, count, rows, out_pitch, source_pitches).task;
}

void multimem_reduce(std::uint64_t stream, std::uint64_t out, std::uint64_t multicast, const std::string& dtype,
                     std::int64_t count, std::int64_t max_blocks) {
  const DType type = parse_dtype(dtype);
  if (type == DType::kFloat64) {
    throw std::invalid_argument("dtype: expected float32, bfloat16 or float16, got float64");
  }
  ODY_CHECK_VALUE(max_blocks, >=, std::int64_t{0}, "0 for as many as fill the device");
  ODY_CHECK_VALUE(count, >=, std::int64_t{0}, "count");
  const std::uint64_t bytes = static_cast<std::uint64_t>(count) * size_of(type);
  ODY_CHECK_VALUE(bytes % kVectorBytes, ==, std::uint64_t{0}, count, " elements of ", dtype, " are ", bytes,
                  " bytes: expected a multiple of 16");
  ODY_CHECK_VALUE(out % kVectorBytes, ==, std::uint64_t{0}, "out at ", out, " is not aligned to 16 bytes");
  ODY_CHECK_VALUE(multicast % kVectorBytes, ==, std::uint64_t{0}, "multicast at ", multicast,
                  " is not aligned to 16 bytes");
  if (count == 0) return;
  ODY_CHECK_VALUE(out, !=, std::uint64_t{0}, "out is a null pointer");
  ODY_CHECK_VALUE(multicast, !=, std::uint64_t{0}, "multicast is a null pointer");
  const int device = device_of(out, "out");
  if (!multicasts(device)) {
    throw std::runtime_error(concat("device ", device,
                                    " does not multicast: multimem_reduce needs NVLink switches and "
                                    "compute capability 9.0 or later"));
  }
  load_kernels(device);
  const DeviceGuard guard(device);
  const std::uint64_t vectors = bytes / kVectorBytes;
  const Grid grid = reduce_grid(vectors, Share::kDevice, multiprocessors(device),
                                static_cast<int>(std::min<std::int64_t>(max_blocks, 1 << 20)));
  ODY_CUDA(launch_multimem_reduce(MultimemTask{out, multicast, vectors, 1, bytes}, type, grid,
                                  reinterpret_cast<cudaStream_t>(stream)),
           "adding ", count, " elements by multicast");
}

}  // namespace odysseus
