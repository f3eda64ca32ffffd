// For x86-64 machines with AVX-512 (F, BW, DQ, VL).
#if defined(__x86_64__)
#define ODY_KERNELS kAvx512Kernels
#define ODY_KERNELS_NAME "avx512"
#define ODY_TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,f16c")))
#include "half_f16c.inl"
#include "reduce_kernels.inl"
#endif
