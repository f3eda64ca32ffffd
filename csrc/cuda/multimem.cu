// Sums and copies by the switch: one load of a multicast address returns the sum over all ranks' memory, one store
// reaches all of them.
//
// Order.  The same memory has two addresses here: products write, and read, by the ranks' own ones, these kernels go by
// the multicast one.  Both are ordered by what stands between them in the schedule: the writing kernel ends before its
// rank signals with release at system scope, and the reading kernel begins after its rank has acquired that signal.
// The proxy fence is for the second address, on the side of these kernels, since products have none.
#include "launch.cuh"
#include "tasks.h"

namespace odysseus {
namespace {

// As many as fill a multiprocessor, so that a sum beside products holds no more of them than it was given blocks.
constexpr int kLargestBlock = 1024;
constexpr int kInFlight = 4;

__device__ __forceinline__ void fence_aliases() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("fence.proxy.alias;" ::: "memory");
#endif
}

template <DType kDType>
__device__ __forceinline__ uint4 load_sum(std::uint64_t multicast) {
  uint4 sum{};
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  if constexpr (kDType == DType::kFloat32) {
    asm volatile("multimem.ld_reduce.relaxed.sys.global.add.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(sum.x), "=r"(sum.y), "=r"(sum.z), "=r"(sum.w)
                 : "l"(multicast)
                 : "memory");
  } else if constexpr (kDType == DType::kBFloat16) {
    asm volatile("multimem.ld_reduce.relaxed.sys.global.add.acc::f32.v4.bf16x2 {%0, %1, %2, %3}, [%4];"
                 : "=r"(sum.x), "=r"(sum.y), "=r"(sum.z), "=r"(sum.w)
                 : "l"(multicast)
                 : "memory");
  } else {
    asm volatile("multimem.ld_reduce.relaxed.sys.global.add.acc::f32.v4.f16x2 {%0, %1, %2, %3}, [%4];"
                 : "=r"(sum.x), "=r"(sum.y), "=r"(sum.z), "=r"(sum.w)
                 : "l"(multicast)
                 : "memory");
  }
#else
  __trap();  // the host has checked that the device multicasts
#endif
  return sum;
}

// Four words of 32 bits, whatever they are: nothing is computed.
__device__ __forceinline__ void store_all(std::uint64_t multicast, uint4 value) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("multimem.st.relaxed.sys.global.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(multicast), "r"(value.x),
               "r"(value.y), "r"(value.z), "r"(value.w)
               : "memory");
#else
  __trap();
#endif
}

// Calls each(i, count) for vectors i, i + threads, ... of a row, `count` at once.
template <class Each>
__device__ __forceinline__ void stride(std::uint64_t vectors, const Each& each) {
  const std::uint64_t threads = static_cast<std::uint64_t>(gridDim.x) * blockDim.x;
  std::uint64_t i = static_cast<std::uint64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  for (; i + (kInFlight - 1) * threads < vectors; i += kInFlight * threads) each(i, threads, true);
  for (; i < vectors; i += threads) each(i, threads, false);
}

template <DType kDType>
__global__ void __launch_bounds__(kLargestBlock, 1)
    multimem_sum_kernel(const __grid_constant__ MultimemTask task) {
  fence_aliases();
  for (std::uint64_t row = 0; row < task.rows; ++row) {
    uint4* const out = reinterpret_cast<uint4*>(task.local + row * task.pitch);
    const std::uint64_t from = task.multicast + row * task.vectors * sizeof(uint4);
    stride(task.vectors, [&](std::uint64_t i, std::uint64_t threads, bool several) {
      if (!several) {
        out[i] = load_sum<kDType>(from + i * sizeof(uint4));
        return;
      }
      uint4 sums[kInFlight];
#pragma unroll
      for (int j = 0; j < kInFlight; ++j) sums[j] = load_sum<kDType>(from + (i + j * threads) * sizeof(uint4));
#pragma unroll
      for (int j = 0; j < kInFlight; ++j) out[i + j * threads] = sums[j];
    });
  }
}

__global__ void __launch_bounds__(kLargestBlock, 1)
    multimem_store_kernel(const __grid_constant__ MultimemTask task) {
  for (std::uint64_t row = 0; row < task.rows; ++row) {
    const uint4* const from = reinterpret_cast<const uint4*>(task.local + row * task.pitch);
    const std::uint64_t to = task.multicast + row * task.vectors * sizeof(uint4);
    stride(task.vectors, [&](std::uint64_t i, std::uint64_t threads, bool several) {
      if (!several) {
        store_all(to + i * sizeof(uint4), from[i]);
        return;
      }
      uint4 values[kInFlight];
#pragma unroll
      for (int j = 0; j < kInFlight; ++j) values[j] = from[i + j * threads];
#pragma unroll
      for (int j = 0; j < kInFlight; ++j) store_all(to + (i + j * threads) * sizeof(uint4), values[j]);
    });
  }
  fence_aliases();
}

}  // namespace

cudaError_t launch_multimem_reduce(const MultimemTask& task, DType dtype, Grid grid, cudaStream_t stream) {
  switch (dtype) {
    case DType::kFloat32:
      return launch(multimem_sum_kernel<DType::kFloat32>, grid.blocks, grid.threads, stream, task);
    case DType::kBFloat16:
      return launch(multimem_sum_kernel<DType::kBFloat16>, grid.blocks, grid.threads, stream, task);
    case DType::kFloat16:
      return launch(multimem_sum_kernel<DType::kFloat16>, grid.blocks, grid.threads, stream, task);
    default:
      return cudaErrorInvalidValue;
  }
}

cudaError_t launch_multimem_store(const MultimemTask& task, Grid grid, cudaStream_t stream) {
  return launch(multimem_store_kernel, grid.blocks, grid.threads, stream, task);
}

std::vector<const void*> multimem_kernels() {
  return {reinterpret_cast<const void*>(multimem_sum_kernel<DType::kFloat32>),
          reinterpret_cast<const void*>(multimem_sum_kernel<DType::kBFloat16>),
          reinterpret_cast<const void*>(multimem_sum_kernel<DType::kFloat16>),
          reinterpret_cast<const void*>(multimem_store_kernel)};
}

}  // namespace odysseus
