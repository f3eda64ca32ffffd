// The emulated link between buffers of one device: a kernel books it, another copies at its pace.
//
// A copy engine moves data within a device at about 90 GB/s only, and a copy kernel of the runtime fills the device.
// This one holds as many multiprocessors as its rate takes, which a real link would not: a figure measured over such a
// link is no better than one over a real link of that rate.
#include "launch.cuh"
#include "device.cuh"
#include "tasks.h"

namespace odysseus {
namespace {

__device__ __forceinline__ void sleep_until(std::uint64_t time) {
  for (std::uint64_t now = global_time(); now < time; now = global_time()) {
    // A sleep lasts up to twice as long as asked for.
    const std::uint64_t half = (time - now) / 2;
    __nanosleep(static_cast<unsigned>(half < 1000 ? half : 1000));
  }
}

__global__ void book_kernel(const __grid_constant__ LinkTask task) {
  const std::uint64_t now = global_time();
  unsigned long long* const clock = reinterpret_cast<unsigned long long*>(task.busy_until);
  unsigned long long seen = *reinterpret_cast<volatile unsigned long long*>(clock);
  std::uint64_t start;
  while (true) {
    start = now > seen ? now : seen;
    const unsigned long long found = atomicCAS(clock, seen, start + task.duration_ns);
    if (found == seen) break;
    seen = found;
  }
  *task.over_at = start + task.duration_ns;
}

__global__ void __launch_bounds__(kLinkThreads, 1) link_copy_kernel(const __grid_constant__ LinkCopyTask task) {
  const std::uint64_t over_at = *task.over_at;
  const std::uint64_t begin = over_at - task.duration_ns;
  const std::uint64_t total = link_blocks(task);
  for (std::uint64_t index = blockIdx.x; index < total; index += gridDim.x) {
    if (threadIdx.x == 0) sleep_until(begin + block_due_ns(task, index));
    __syncthreads();
    copy_block(task, index, threadIdx.x, blockDim.x);
  }
  if (threadIdx.x == 0) sleep_until(over_at);
}

}  // namespace

cudaError_t launch_book(const LinkTask& task, cudaStream_t stream) { return launch(book_kernel, 1, 1, stream, task); }

cudaError_t launch_link_copy(const LinkCopyTask& task, int blocks, cudaStream_t stream) {
  return launch(link_copy_kernel, blocks, kLinkThreads, stream, task);
}

std::vector<const void*> link_kernels() {
  return {reinterpret_cast<const void*>(book_kernel), reinterpret_cast<const void*>(link_copy_kernel)};
}

}  // namespace odysseus
