// What every machine of the architecture runs: SSE2 on x86-64, NEON on aarch64, as far as the compiler vectorises.
#define ODY_KERNELS kBaselineKernels
#define ODY_KERNELS_NAME "baseline"
#define ODY_TARGET
#define ODY_HALF_LANES 0
#include "reduce_kernels.inl"
