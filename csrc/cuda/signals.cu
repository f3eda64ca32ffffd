// Kernels of one small block that order streams and ranks: waits, signals and epochs.
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

std::vector<const void*> signal_kernels() {
  return {reinterpret_cast<const void*>(wait_kernel), reinterpret_cast<const void*>(signal_kernel),
          reinterpret_cast<const void*>(advance_kernel)};
}

}  // namespace odysseus
