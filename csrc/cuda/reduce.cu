// Reductions of up to 16 sources, which may lie in peers' memory; reduce_worker.h is what each thread does.
#include "launch.cuh"
#include "wait.cuh"

namespace odysseus {
namespace {

constexpr int kLargestBlock = 1024;

// 64 registers: the most with which a block of 1024 threads fits a multiprocessor, and enough for what is in flight.
template <class Source, class Out, bool kFew>
__global__ void __launch_bounds__(kLargestBlock, 1)
    reduce_kernel(const __grid_constant__ ReduceTask task, const __grid_constant__ WaitTask wait) {
  if (wait.count > 0) {
    if (threadIdx.x < kWordsAtOnce) wait_in_warp(wait, static_cast<int>(threadIdx.x));
    __syncthreads();
  }
  const std::uint64_t worker = static_cast<std::uint64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const std::uint64_t workers = static_cast<std::uint64_t>(gridDim.x) * blockDim.x;
  if constexpr (kFew) {
    few_sources<Source, Out>(task, worker, workers);
  } else {
    many_sources<Source, Out>(task, worker, workers);
  }
}

using ReduceKernel = void (*)(ReduceTask, WaitTask);

template <class Source, class Out>
ReduceKernel kernel_for(int sources) {
  return sources <= kFewSources ? reduce_kernel<Source, Out, true> : reduce_kernel<Source, Out, false>;
}

}  // namespace

cudaError_t launch_reduce(const ReduceTask& task, const WaitTask& wait, DType source, DType out, Grid grid,
                          cudaStream_t stream) {
  cudaError_t error = cudaErrorInvalidValue;
  with_types(source, out, [&](auto from, auto to) {
    error =
        launch(kernel_for<decltype(from), decltype(to)>(task.sources), grid.blocks, grid.threads, stream, task, wait);
  });
  return error;
}

std::vector<const void*> reduce_kernels() {
  std::vector<const void*> kernels;
  for (int source = 0; source < kDTypes; ++source) {
    for (int out = 0; out < kDTypes; ++out) {
      with_types(static_cast<DType>(source), static_cast<DType>(out), [&](auto from, auto to) {
        for (const int sources : {1, kMaxSources}) {
          kernels.push_back(reinterpret_cast<const void*>(kernel_for<decltype(from), decltype(to)>(sources)));
        }
      });
    }
  }
  return kernels;
}

}  // namespace odysseus
