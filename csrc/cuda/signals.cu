// Kernels of one small block that order streams and ranks: waits, signals, epochs, and the emulated link.
#include "launch.cuh"
#include "wait.cuh"

namespace odysseus {
namespace {

__global__ void __launch_bounds__(kWordsAtOnce) wait_kernel(const __grid_constant__ WaitTask task) {
  wait_in_warp(task, static_cast<int>(threadIdx.x));
}

__global__ void __launch_bounds__(kWordsAtOnce) signal_kernel(const __grid_constant__ SignalTask task) {
  const int lane = static_cast<int>(threadIdx.x);
  if (lane >= task.count) return;
  // A rank that gave up may have left out what the signal would announce.
  if (load_acquire_device(task.aborted) != 0) return;
  // The order of the stream puts everything before it into what is released.
  store_release_system(task.words[lane], word_of(*task.epoch, task.values[lane]));
}

__global__ void advance_kernel(std::uint32_t* epoch) { *epoch += 1; }

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
  sleep_until(start);
}

__global__ void release_kernel(const std::uint64_t* over_at) { sleep_until(*over_at); }

}  // namespace

cudaError_t launch_wait(const WaitTask& task, cudaStream_t stream) {
  return launch(wait_kernel, 1, kWordsAtOnce, stream, task);
}

cudaError_t launch_signal(const SignalTask& task, cudaStream_t stream) {
  return launch(signal_kernel, 1, kWordsAtOnce, stream, task);
}

cudaError_t launch_advance(std::uint32_t* epoch, cudaStream_t stream) {
  return launch(advance_kernel, 1, 1, stream, epoch);
}

cudaError_t launch_book(const LinkTask& task, cudaStream_t stream) { return launch(book_kernel, 1, 1, stream, task); }

cudaError_t launch_release(const std::uint64_t* over_at, cudaStream_t stream) {
  return launch(release_kernel, 1, 1, stream, over_at);
}

std::vector<const void*> signal_kernels() {
  return {reinterpret_cast<const void*>(wait_kernel), reinterpret_cast<const void*>(signal_kernel),
          reinterpret_cast<const void*>(advance_kernel), reinterpret_cast<const void*>(book_kernel),
          reinterpret_cast<const void*>(release_kernel)};
}

}  // namespace odysseus
