// The bodies of ReduceKernels.  Included by one source file for each instruction set, which defines
//   ODY_KERNELS        the name of the table to define
//   ODY_KERNELS_NAME   what to call it to people
//   ODY_TARGET         the function attribute that selects the instruction set
//   ODY_HALF_LANES     lanes of the hardware's fp16 conversions, with widen_half and narrow_half for so many lanes;
//                      0 where it has none
// Attributes and not compiler flags select the instruction set, because a flag would also apply to the inline
// functions of included headers, one copy of which the linker then keeps for machines that lack the instructions.

#include <cstddef>
#include <cstdint>

#include "reduce_kernels.h"

namespace odysseus {
namespace {

// Elements as they lie in memory: the callers' addresses may be unaligned, and alias whatever wrote them.
typedef float f32_t __attribute__((aligned(1), may_alias));
typedef double f64_t __attribute__((aligned(1), may_alias));
typedef std::uint16_t b16_t __attribute__((aligned(1), may_alias));

struct Float32 {
  using Stored = f32_t;
  HOST_DEVICE static float widen(float value) { return value; }
  HOST_DEVICE static float narrow(float value) { return value; }
};
struct Float64 {
  using Stored = f64_t;
  HOST_DEVICE static double widen(double value) { return value; }
  HOST_DEVICE static double narrow(double value) { return value; }
};
struct BFloat16 {
  using Stored = b16_t;
  HOST_DEVICE static float widen(std::uint16_t bits) { return bfloat16_to_float(bits); }
  HOST_DEVICE static std::uint16_t narrow(float value) { return float_to_bfloat16(value); }
};
struct Float16 {
  using Stored = b16_t;
  HOST_DEVICE static float widen(std::uint16_t bits) { return float16_to_float(bits); }
  HOST_DEVICE static std::uint16_t narrow(float value) { return float_to_float16(value); }
};

template <class Type, class Sum, class Memory>
ODY_TARGET void set(Sum* sum, const void* source, std::size_t count) {
  const auto* from = static_cast<const typename Type::Stored*>(source);
  auto* to = reinterpret_cast<Memory*>(sum);
  for (std::size_t i = 0; i < count; ++i) to[i] = Type::widen(from[i]);
}

template <class Type, class Sum, class Memory>
ODY_TARGET void pair(Sum* sum, const void* first, const void* second, std::size_t count) {
  const auto* a = static_cast<const typename Type::Stored*>(first);
  const auto* b = static_cast<const typename Type::Stored*>(second);
  auto* to = reinterpret_cast<Memory*>(sum);
// The sum may be one of its sources, element by element, which the compiler's own overlap check would send down a
// scalar path.
#pragma GCC ivdep
  for (std::size_t i = 0; i < count; ++i)
    to[i] = static_cast<Sum>(Type::widen(a[i])) + static_cast<Sum>(Type::widen(b[i]));
}

template <class Type, class Sum, class Memory>
ODY_TARGET void add(Sum* sum, const void* source, std::size_t count) {
  const auto* from = static_cast<const typename Type::Stored*>(source);
  auto* to = reinterpret_cast<Memory*>(sum);
  for (std::size_t i = 0; i < count; ++i) to[i] += Type::widen(from[i]);
}

template <class Type, class Sum, class Memory>
ODY_TARGET void store(void* out, const Sum* sum, std::size_t count) {
  const auto* from = reinterpret_cast<const Memory*>(sum);
  auto* to = static_cast<typename Type::Stored*>(out);
  for (std::size_t i = 0; i < count; ++i) to[i] = Type::narrow(from[i]);
}

#if ODY_HALF_LANES > 0
ODY_TARGET void set_half(float* sum, const void* source, std::size_t count) {
  const std::size_t whole = count / ODY_HALF_LANES * ODY_HALF_LANES;
  const auto* from = static_cast<const b16_t*>(source);
  auto* to = reinterpret_cast<f32_t*>(sum);
  for (std::size_t i = 0; i < whole; i += ODY_HALF_LANES) widen_half(to + i, from + i, false);
  set<Float16, float, f32_t>(sum + whole, from + whole, count - whole);
}

ODY_TARGET void pair_half(float* sum, const void* first, const void* second, std::size_t count) {
  const std::size_t whole = count / ODY_HALF_LANES * ODY_HALF_LANES;
  const auto* a = static_cast<const b16_t*>(first);
  const auto* b = static_cast<const b16_t*>(second);
  auto* to = reinterpret_cast<f32_t*>(sum);
  for (std::size_t i = 0; i < whole; i += ODY_HALF_LANES) {
    widen_half(to + i, a + i, false);
    widen_half(to + i, b + i, true);
  }
  pair<Float16, float, f32_t>(sum + whole, a + whole, b + whole, count - whole);
}

ODY_TARGET void add_half(float* sum, const void* source, std::size_t count) {
  const std::size_t whole = count / ODY_HALF_LANES * ODY_HALF_LANES;
  const auto* from = static_cast<const b16_t*>(source);
  auto* to = reinterpret_cast<f32_t*>(sum);
  for (std::size_t i = 0; i < whole; i += ODY_HALF_LANES) widen_half(to + i, from + i, true);
  add<Float16, float, f32_t>(sum + whole, from + whole, count - whole);
}

ODY_TARGET void store_half(void* out, const float* sum, std::size_t count) {
  const std::size_t whole = count / ODY_HALF_LANES * ODY_HALF_LANES;
  const auto* from = reinterpret_cast<const f32_t*>(sum);
  auto* to = static_cast<b16_t*>(out);
  for (std::size_t i = 0; i < whole; i += ODY_HALF_LANES) narrow_half(to + i, from + i);
  store<Float16, float, f32_t>(to + whole, sum + whole, count - whole);
}
#else
constexpr auto set_half = set<Float16, float, f32_t>;
constexpr auto pair_half = pair<Float16, float, f32_t>;
constexpr auto add_half = add<Float16, float, f32_t>;
constexpr auto store_half = store<Float16, float, f32_t>;
#endif

}  // namespace

// In the order of DType: fp32, fp64, bf16, fp16.
extern const ReduceKernels ODY_KERNELS = {
    ODY_KERNELS_NAME,
    {
        {set<Float32, float, f32_t>, nullptr, set<BFloat16, float, f32_t>, set_half},
        {pair<Float32, float, f32_t>, nullptr, pair<BFloat16, float, f32_t>, pair_half},
        {add<Float32, float, f32_t>, nullptr, add<BFloat16, float, f32_t>, add_half},
        {store<Float32, float, f32_t>, nullptr, store<BFloat16, float, f32_t>, store_half},
    },
    {
        {set<Float32, double, f64_t>, set<Float64, double, f64_t>, set<BFloat16, double, f64_t>,
         set<Float16, double, f64_t>},
        {pair<Float32, double, f64_t>, pair<Float64, double, f64_t>, pair<BFloat16, double, f64_t>,
         pair<Float16, double, f64_t>},
        {add<Float32, double, f64_t>, add<Float64, double, f64_t>, add<BFloat16, double, f64_t>,
         add<Float16, double, f64_t>},
        {store<Float32, double, f64_t>, store<Float64, double, f64_t>, store<BFloat16, double, f64_t>,
         store<Float16, double, f64_t>},
    },
};

}  // namespace odysseus
