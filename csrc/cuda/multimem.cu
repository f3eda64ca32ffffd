// Reductions by the switch: one load of a multicast address returns the sum over all ranks' memory.
#include "launch.cuh"
#include "tasks.h"

namespace odysseus {
namespace {

constexpr int kBlock = 512;
constexpr int kInFlight = 4;

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

template <DType kDType>
__global__ void __launch_bounds__(kBlock) multimem_kernel(const __grid_constant__ MultimemTask task) {
  uint4* const out = reinterpret_cast<uint4*>(task.out);
  const std::uint64_t threads = static_cast<std::uint64_t>(gridDim.x) * blockDim.x;
  std::uint64_t i = static_cast<std::uint64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  for (; i + (kInFlight - 1) * threads < task.vectors; i += kInFlight * threads) {
    uint4 sums[kInFlight];
#pragma unroll
    for (int j = 0; j < kInFlight; ++j) sums[j] = load_sum<kDType>(task.multicast + (i + j * threads) * sizeof(uint4));
#pragma unroll
    for (int j = 0; j < kInFlight; ++j) out[i + j * threads] = sums[j];
  }
  for (; i < task.vectors; i += threads) out[i] = load_sum<kDType>(task.multicast + i * sizeof(uint4));
}

}  // namespace

cudaError_t launch_multimem_reduce(const MultimemTask& task, DType dtype, Grid grid, cudaStream_t stream) {
  switch (dtype) {
    case DType::kFloat32:
      return launch(multimem_kernel<DType::kFloat32>, grid.blocks, grid.threads, stream, task);
    case DType::kBFloat16:
      return launch(multimem_kernel<DType::kBFloat16>, grid.blocks, grid.threads, stream, task);
    case DType::kFloat16:
      return launch(multimem_kernel<DType::kFloat16>, grid.blocks, grid.threads, stream, task);
    default:
      return cudaErrorInvalidValue;
  }
}

std::vector<const void*> multimem_kernels() {
  return {reinterpret_cast<const void*>(multimem_kernel<DType::kFloat32>),
          reinterpret_cast<const void*>(multimem_kernel<DType::kBFloat16>),
          reinterpret_cast<const void*>(multimem_kernel<DType::kFloat16>)};
}

}  // namespace odysseus
