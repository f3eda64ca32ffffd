#include "reduce.h"

#include <algorithm>
#include <atomic>

#include "../common/check.h"
#include "reduce_kernels.h"

namespace odysseus {
namespace {

// 8 KB of fp32 accumulator: together with a block of each source it stays in the first-level cache.
constexpr std::size_t kBlock = 2048;

// What this machine can run, best first.
std::vector<const ReduceKernels*> usable_kernels() {
  std::vector<const ReduceKernels*> usable;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    usable.push_back(&kAvx512Kernels);
  }
  // Every processor with AVX2 has F16C, and older compilers cannot ask for the latter.
  if (__builtin_cpu_supports("avx2")) usable.push_back(&kAvx2Kernels);
#endif
  usable.push_back(&kBaselineKernels);
  return usable;
}

std::atomic<const ReduceKernels*>& picked_kernels() {
  static std::atomic<const ReduceKernels*> picked{usable_kernels().front()};
  return picked;
}

const ReduceKernels& kernels() { return *picked_kernels().load(std::memory_order_relaxed); }

const void* element(const Operand& operand, std::size_t index) {
  return reinterpret_cast<const void*>(operand.address + index * size_of(operand.dtype));
}

// Whether the first two sources can be added in one pass.
bool starts_with_pair(const std::vector<Operand>& sources) {
  return sources.size() > 1 && sources[0].dtype == sources[1].dtype;
}

// Whether `out` can hold the running sum itself: it has the accumulator's type, and no source is read from it after
// the sum has begun to overwrite it.
bool sums_in_place(const Operand& out, const std::vector<Operand>& sources, DType accumulator) {
  if (out.dtype != accumulator) return false;
  return std::none_of(sources.begin() + (starts_with_pair(sources) ? 2 : 1), sources.end(),
                      [&](const Operand& source) { return source.address == out.address; });
}

template <class Sum>
void reduce_as(const SumKernels<Sum>& loops, DType accumulator, const Operand& out,
               const std::vector<Operand>& sources, std::size_t count) {
  const bool in_place = sums_in_place(out, sources, accumulator);
  const bool paired = starts_with_pair(sources);
  const auto kernel = [](const auto& table, DType dtype) { return table[static_cast<int>(dtype)]; };
  alignas(64) Sum block[kBlock];
  for (std::size_t start = 0; start < count; start += kBlock) {
    const std::size_t length = std::min(kBlock, count - start);
    void* target = const_cast<void*>(element(out, start));
    Sum* sum = in_place ? static_cast<Sum*>(target) : block;
    const void* first = element(sources[0], start);
    // Beginning with sources, not with zero, keeps -0 and saves a pass.
    if (paired) {
      kernel(loops.pair, sources[0].dtype)(sum, first, element(sources[1], start), length);
    } else if (first != sum) {
      kernel(loops.set, sources[0].dtype)(sum, first, length);
    }
    for (std::size_t i = paired ? 2 : 1; i < sources.size(); ++i) {
      kernel(loops.add, sources[i].dtype)(sum, element(sources[i], start), length);
    }
    if (!in_place) kernel(loops.store, out.dtype)(target, sum, length);
  }
}

bool overlap(const Operand& a, const Operand& b, std::size_t count) {
  return a.address < b.address + count * size_of(b.dtype) && b.address < a.address + count * size_of(a.dtype);
}

}  // namespace

DType parse_dtype(const std::string& name) {
  if (name == "float32") return DType::kFloat32;
  if (name == "float64") return DType::kFloat64;
  if (name == "bfloat16") return DType::kBFloat16;
  if (name == "float16") return DType::kFloat16;
  throw std::invalid_argument(concat("dtype: expected float32, float64, bfloat16 or float16, got ", name));
}

void check_reduce(const Operand& out, const std::vector<Operand>& sources, std::size_t count) {
  ODY_CHECK_VALUE(sources.size(), >=, std::size_t{1}, "a reduction needs a source");
  if (count == 0) return;
  for (std::size_t i = 0; i < sources.size(); ++i) {
    const Operand& source = sources[i];
    const std::string name = concat("source ", i);
    ODY_CHECK_VALUE(source.address, !=, std::uintptr_t{0}, name, " is a null pointer");
    const bool same = source.address == out.address && source.dtype == out.dtype;
    if (!same && overlap(out, source, count)) {
      throw std::invalid_argument(concat(name, " at ", source.address, " and the output at ", out.address,
                                         " overlap in ", count,
                                         " elements: expected the same array or separate ones"));
    }
  }
  ODY_CHECK_VALUE(out.address, !=, std::uintptr_t{0}, "the output is a null pointer");
}

void reduce(const Operand& out, const std::vector<Operand>& sources, std::size_t count) {
  const auto is_fp64 = [](const Operand& operand) { return operand.dtype == DType::kFloat64; };
  if (is_fp64(out) || std::any_of(sources.begin(), sources.end(), is_fp64)) {
    reduce_as(kernels().fp64, DType::kFloat64, out, sources, count);
  } else {
    reduce_as(kernels().fp32, DType::kFloat32, out, sources, count);
  }
}

const char* simd_name() { return kernels().name; }

void use_simd(const std::string& name) {
  std::string names;
  for (const ReduceKernels* usable : usable_kernels()) {
    if (usable->name == name) {
      picked_kernels().store(usable, std::memory_order_relaxed);
      return;
    }
    names += concat(names.empty() ? "" : ", ", usable->name);
  }
  throw std::invalid_argument(concat("simd: expected one that this machine has (", names, "), got ", name));
}

}  // namespace odysseus
