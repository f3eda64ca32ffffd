// Loops over one block of elements, compiled once for each instruction set.
#pragma once

#include <cstddef>

#include "../common/dtype.h"

namespace odysseus {

// Loops with an accumulator of type Sum, indexed by the other arrays' DType.  Addresses need no alignment; arrays of
// one type may be the same.  `pair` is `set` and `add` in one pass: sum[i] = first[i] + second[i].
template <class Sum>
struct SumKernels {
  void (*set[kDTypes])(Sum* sum, const void* source, std::size_t count);  // sum[i] = source[i]
  void (*pair[kDTypes])(Sum* sum, const void* first, const void* second, std::size_t count);
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
