// What one thread of a reduction does, for host and device: the whole kernel but for its launch, so that its
// arithmetic and its indices are tested on a CPU.
//
// Sources are added in order, in fp32 (fp64 for fp64), and rounded once.  The output may be one of the sources: an
// element is read and written by the same thread, in that order, and nothing is declared __restrict__.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "../common/dtype.h"

#if defined(__CUDACC__)
#define ODY_UNROLL _Pragma("unroll")
#else
#define ODY_UNROLL
#endif

namespace odysseus {

constexpr int kMaxSources = 16;
constexpr std::size_t kVectorBytes = 16;

// Rows of elements at raw addresses; pitches are in bytes.  A row is `head` elements, `vectors` 16-byte loads of each
// source, and `tail` elements.
struct ReduceTask {
  std::uint64_t out;
  std::uint64_t out_pitch;
  std::uint64_t source[kMaxSources];
  std::uint64_t source_pitch[kMaxSources];
  std::uint64_t count;
  std::uint32_t rows;
  int sources;
  std::uint64_t head;
  std::uint64_t vectors;
  std::uint64_t tail;
};

// ---- element types ----------------------------------------------------------------------------------------------
// widen() and narrow() convert between what memory holds and the running sum.  On the device they are instructions,
// equal to common/dtype.h in every bit but the payload of a NaN.

struct Float32 {
  using Stored = float;
  using Sum = float;
  HOST_DEVICE static Sum widen(Stored value) { return value; }
  HOST_DEVICE static Stored narrow(Sum value) { return value; }
};

struct Float64 {
  using Stored = double;
  using Sum = double;
  HOST_DEVICE static Sum widen(Stored value) { return value; }
  HOST_DEVICE static Stored narrow(Sum value) { return value; }
};

struct BFloat16 {
  using Stored = std::uint16_t;
  using Sum = float;
  HOST_DEVICE static Sum widen(Stored bits) { return bfloat16_to_float(bits); }
  HOST_DEVICE static Stored narrow(Sum value) {
#if defined(__CUDA_ARCH__)
    Stored bits;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
#else
    return float_to_bfloat16(value);
#endif
  }
};

struct Float16 {
  using Stored = std::uint16_t;
  using Sum = float;
  HOST_DEVICE static Sum widen(Stored bits) {
#if defined(__CUDA_ARCH__)
    Sum value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
#else
    return float16_to_float(bits);
#endif
  }
  HOST_DEVICE static Stored narrow(Sum value) {
#if defined(__CUDA_ARCH__)
    Stored bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
#else
    return float_to_float16(value);
#endif
  }
};

// ---- memory -----------------------------------------------------------------------------------------------------

// `kBytes` bytes that travel together: one access on the device up to 16 bytes, two for 32.
template <std::size_t kBytes>
struct alignas(kBytes < kVectorBytes ? kBytes : kVectorBytes) Pack {
  std::uint32_t words[kBytes / 4];
};
template <>
struct Pack<2> {
  std::uint16_t half;
};

// Plain loads and stores.  On the device in assembly, because the compiler does not know that an integer addresses
// global memory, and generic accesses are slower.
template <std::size_t kBytes>
HOST_DEVICE Pack<kBytes> load(std::uint64_t address) {
  Pack<kBytes> pack;
#if defined(__CUDA_ARCH__)
  if constexpr (kBytes == 2) {
    asm volatile("ld.global.u16 %0, [%1];" : "=h"(pack.half) : "l"(address) : "memory");
  } else if constexpr (kBytes == 4) {
    asm volatile("ld.global.u32 %0, [%1];" : "=r"(pack.words[0]) : "l"(address) : "memory");
  } else if constexpr (kBytes == 8) {
    asm volatile("ld.global.v2.u32 {%0, %1}, [%2];"
                 : "=r"(pack.words[0]), "=r"(pack.words[1])
                 : "l"(address)
                 : "memory");
  } else {
    static_assert(kBytes == 16);
    asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(pack.words[0]), "=r"(pack.words[1]), "=r"(pack.words[2]), "=r"(pack.words[3])
                 : "l"(address)
                 : "memory");
  }
#else
  memcpy(&pack, reinterpret_cast<const void*>(address), kBytes);
#endif
  return pack;
}

template <std::size_t kBytes>
HOST_DEVICE void store(std::uint64_t address, const Pack<kBytes>& pack) {
#if defined(__CUDA_ARCH__)
  if constexpr (kBytes == 2) {
    asm volatile("st.global.u16 [%0], %1;" ::"l"(address), "h"(pack.half) : "memory");
  } else if constexpr (kBytes == 4) {
    asm volatile("st.global.u32 [%0], %1;" ::"l"(address), "r"(pack.words[0]) : "memory");
  } else if constexpr (kBytes == 8) {
    asm volatile("st.global.v2.u32 [%0], {%1, %2};" ::"l"(address), "r"(pack.words[0]), "r"(pack.words[1]) : "memory");
  } else {
    static_assert(kBytes % 16 == 0);
    ODY_UNROLL
    for (std::size_t i = 0; i < kBytes / 4; i += 4) {
      asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(address + 4 * i), "r"(pack.words[i]),
                   "r"(pack.words[i + 1]), "r"(pack.words[i + 2]), "r"(pack.words[i + 3])
                   : "memory");
    }
  }
#else
  memcpy(reinterpret_cast<void*>(address), &pack, kBytes);
#endif
}

// ---- sums -------------------------------------------------------------------------------------------------------

// Adds `kGroups` accesses of `kWidth` elements each, that begin at `element[i]` of `row[i]`.
// Loads of kBatch sources and all groups are in flight together.
template <class Source, class Out, int kWidth, int kGroups, int kBatch>
HOST_DEVICE void reduce_groups(const ReduceTask& task, const std::uint32_t (&row)[kGroups],
                               const std::uint64_t (&element)[kGroups]) {
  using Sum = typename Source::Sum;
  using From = typename Source::Stored;
  using To = typename Out::Stored;
  using Loaded = Pack<kWidth * sizeof(From)>;
  using Kept = Pack<kWidth * sizeof(To)>;
  Sum sum[kGroups][kWidth];
  ODY_UNROLL
  for (int group = 0; group < kGroups; ++group) {
    ODY_UNROLL
    for (int i = 0; i < kWidth; ++i) sum[group][i] = -Sum{0};  // the neutral element: -0 + x is x, for -0 and +0 too
  }
  for (int first = 0; first < task.sources; first += kBatch) {
    Loaded loaded[kBatch][kGroups] = {};
    ODY_UNROLL
    for (int i = 0; i < kBatch; ++i) {
      if (first + i >= task.sources) break;
      ODY_UNROLL
      for (int group = 0; group < kGroups; ++group) {
        loaded[i][group] = load<sizeof(Loaded)>(task.source[first + i] + row[group] * task.source_pitch[first + i] +
                                                element[group] * sizeof(From));
      }
    }
    ODY_UNROLL
    for (int i = 0; i < kBatch; ++i) {
      if (first + i >= task.sources) break;
      ODY_UNROLL
      for (int group = 0; group < kGroups; ++group) {
        From values[kWidth];
        memcpy(values, &loaded[i][group], sizeof values);
        ODY_UNROLL
        for (int j = 0; j < kWidth; ++j) sum[group][j] += Source::widen(values[j]);
      }
    }
  }
  ODY_UNROLL
  for (int group = 0; group < kGroups; ++group) {
    To values[kWidth];
    ODY_UNROLL
    for (int j = 0; j < kWidth; ++j) values[j] = Out::narrow(sum[group][j]);
    Kept kept;
    memcpy(&kept, values, sizeof kept);
    store<sizeof(Kept)>(task.out + row[group] * task.out_pitch + element[group] * sizeof(To), kept);
  }
}

// Division by the accesses of a row, which a single row does not need and 32 bits do faster.
HOST_DEVICE std::uint32_t row_of(std::uint64_t index, std::uint64_t per_row, std::uint32_t rows) {
  if (rows == 1) return 0;
  if (((index | per_row) >> 32) == 0) return static_cast<std::uint32_t>(index) / static_cast<std::uint32_t>(per_row);
  return static_cast<std::uint32_t>(index / per_row);
}

// Accesses worker, worker + workers, ... of all rows, each kWidth elements wide; `element_of` says where in its row
// one begins.
template <class Source, class Out, int kWidth, int kGroups, int kBatch, class ElementOf>
HOST_DEVICE void reduce_strided(const ReduceTask& task, std::uint64_t per_row, std::uint64_t worker,
                                std::uint64_t workers, const ElementOf& element_of) {
  const std::uint64_t total = per_row * task.rows;
  std::uint64_t index = worker;
  for (; index + (kGroups - 1) * workers < total; index += kGroups * workers) {
    std::uint32_t row[kGroups];
    std::uint64_t element[kGroups];
    ODY_UNROLL
    for (int group = 0; group < kGroups; ++group) {
      const std::uint64_t access = index + group * workers;
      row[group] = row_of(access, per_row, task.rows);
      element[group] = element_of(access - row[group] * per_row);
    }
    reduce_groups<Source, Out, kWidth, kGroups, kBatch>(task, row, element);
  }
  for (; index < total; index += workers) {
    const std::uint32_t row[1] = {row_of(index, per_row, task.rows)};
    const std::uint64_t element[1] = {element_of(index - row[0] * per_row)};
    reduce_groups<Source, Out, kWidth, 1, kBatch>(task, row, element);
  }
}

struct VectorAt {
  std::uint64_t head;
  std::uint64_t width;
  HOST_DEVICE std::uint64_t operator()(std::uint64_t vector) const { return head + vector * width; }
};

struct SingleAt {
  std::uint64_t head;
  std::uint64_t skipped;
  HOST_DEVICE std::uint64_t operator()(std::uint64_t single) const {
    return single < head ? single : single + skipped;
  }
};

// The share of thread `worker` out of `workers`.
template <class Source, class Out, int kGroups, int kBatch>
HOST_DEVICE void reduce_worker(const ReduceTask& task, std::uint64_t worker, std::uint64_t workers) {
  constexpr int kWidth = kVectorBytes / sizeof(typename Source::Stored);
  reduce_strided<Source, Out, kWidth, kGroups, kBatch>(task, task.vectors, worker, workers,
                                                       VectorAt{task.head, kWidth});
  reduce_strided<Source, Out, 1, kGroups, kBatch>(task, task.head + task.tail, worker, workers,
                                                  SingleAt{task.head, task.vectors * kWidth});
}

// With few sources, two accesses of each keep enough bytes in flight.
constexpr int kFewSources = 2;

template <class Source, class Out>
HOST_DEVICE void few_sources(const ReduceTask& task, std::uint64_t worker, std::uint64_t workers) {
  reduce_worker<Source, Out, 2, kFewSources>(task, worker, workers);
}

template <class Source, class Out>
HOST_DEVICE void many_sources(const ReduceTask& task, std::uint64_t worker, std::uint64_t workers) {
  reduce_worker<Source, Out, 1, 8>(task, worker, workers);
}

// ---- which types --------------------------------------------------------------------------------------------------

// Calls function(Source{}, Out{}) for a supported pair of types; false where there is none.
template <class Function>
bool with_types(DType source, DType out, Function&& function) {
  const auto is = [&](DType from, DType to) { return source == from && out == to; };
  if (is(DType::kFloat32, DType::kFloat32)) return function(Float32{}, Float32{}), true;
  if (is(DType::kFloat64, DType::kFloat64)) return function(Float64{}, Float64{}), true;
  if (is(DType::kBFloat16, DType::kBFloat16)) return function(BFloat16{}, BFloat16{}), true;
  if (is(DType::kFloat16, DType::kFloat16)) return function(Float16{}, Float16{}), true;
  if (is(DType::kBFloat16, DType::kFloat32)) return function(BFloat16{}, Float32{}), true;
  if (is(DType::kFloat16, DType::kFloat32)) return function(Float16{}, Float32{}), true;
  if (is(DType::kFloat32, DType::kBFloat16)) return function(Float32{}, BFloat16{}), true;
  if (is(DType::kFloat32, DType::kFloat16)) return function(Float32{}, Float16{}), true;
  return false;
}

}  // namespace odysseus
