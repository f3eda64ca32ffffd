// Loops over one block of elements, compiled once for each instruction set.
#pragma once

#include <cstddef>

#include "../common/dtype.h"

namespace odysseus {

// Loops with an accumulator of type Sum, indexed by the other array's DType.  Addresses need no alignment.
template <class Sum>
struct SumKernels {
  void (*set[kDTypes])(Sum* sum, const void* source, std::size_t count);  // sum[i] = source[i]
  void (*add[kDTypes])(Sum* sum, const void* source, std::size_t count);  // sum[i] += source[i]
  void (*store[kDTypes])(void* out, const Sum* sum, std::size_t count);   // out[i] = cast(sum[i])
};

struct ReduceKernels {
  const char* name;
  SumKernels<float> fp32;  // its entries for fp64 are null: fp64 is never added in fp32
  SumKernels<double> fp64;
};

extern const ReduceKernels kBaselineKernels;
#if defined(__x86_64__)
extern const ReduceKernels kAvx2Kernels;
extern const ReduceKernels kAvx512Kernels;
#endif

}  // namespace odysseus
