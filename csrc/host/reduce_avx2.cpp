// For x86-64 machines with AVX2 and F16C.
#if defined(__x86_64__)
#define ODY_KERNELS kAvx2Kernels
#define ODY_KERNELS_NAME "avx2"
#define ODY_TARGET __attribute__((target("avx2,f16c")))
#include "half_f16c.inl"
#include "reduce_kernels.inl"
#endif
