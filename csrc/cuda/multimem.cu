// Sums and copies by the switch: one load of a multicast address returns the sum over all ranks' memory, one store
// reaches all of them.
//
// Order.  The same memory has two addresses here: products write, and read, by the ranks' own ones, these kernels go
// by the multicast one.  Both are ordered by what stands between them in the schedule: the writing kernel ends before
// its rank signals with release at system scope, and the reading kernel begins after its rank has acquired that
// signal.  The proxy fence is for the second address, on the side of these kernels, since products have none.
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

// Local memory, which the compiler cannot know to be global.
__device__ __forceinline__ uint4 load_own(std::uint64_t address) {
  uint4 value;
  asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "l"(address)
               : "memory");
  return value;
}

__device__ __forceinline__ void store_own(std::uint64_t address, uint4 value) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(address), "r"(value.x), "r"(value.y), "r"(value.z),
               "r"(value.w)
               : "memory");
}

// Moves this thread's vectors of each row, kInFlight at a time: all are loaded before the first is stored.
template <class Load, class Store>
__device__ __forceinline__ void move_rows(const MultimemTask& task, const Load& load, const Store& store) {
  const std::uint64_t threads = static_cast<std::uint64_t>(gridDim.x) * blockDim.x;
  const std::uint64_t first = static_cast<std::uint64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  for (std::uint64_t row = 0; row < task.rows; ++row) {
    const std::uint64_t local = task.local + row * task.pitch;
    const std::uint64_t everywhere = task.multicast + row * task.vectors * sizeof(uint4);
    std::uint64_t i = first;
    for (; i + (kInFlight - 1) * threads < task.vectors; i += kInFlight * threads) {
      uint4 values[kInFlight];
#pragma unroll
      for (int j = 0; j < kInFlight; ++j) values[j] = load(local, everywhere, (i + j * threads) * sizeof(uint4));
#pragma unroll
      for (int j = 0; j < kInFlight; ++j) store(local, everywhere, (i + j * threads) * sizeof(uint4), values[j]);
    }
    for (; i < task.vectors; i += threads) {
      store(local, everywhere, i * sizeof(uint4), load(local, everywhere, i * sizeof(uint4)));
    }
  }
}

template <DType kDType>
__global__ void __launch_bounds__(kLargestBlock, 1) multimem_sum_kernel(const __grid_constant__ MultimemTask task) {
  fence_aliases();
  move_rows(
      task, [](std::uint64_t, std::uint64_t everywhere, std::uint64_t i) { return load_sum<kDType>(everywhere + i); },
      [](std::uint64_t local, std::uint64_t, std::uint64_t i, uint4 sum) { store_own(local + i, sum); });
}

__global__ void __launch_bounds__(kLargestBlock, 1) multimem_store_kernel(const __grid_constant__ MultimemTask task) {
  move_rows(
      task, [](std::uint64_t local, std::uint64_t, std::uint64_t i) { return load_own(local + i); },
      [](std::uint64_t, std::uint64_t everywhere, std::uint64_t i, uint4 value) { store_all(everywhere + i, value); });
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
