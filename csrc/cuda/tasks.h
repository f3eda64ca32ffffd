// Parameters of the kernels, and the functions that launch them; no pybind11 and no device code here.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <vector>

#include "plan.h"
#include "words.h"

namespace odysseus {

// Why a wait gave up: kTimedOut, or the code that was given to Control::abort(), at least kSmallestAbort.
constexpr std::uint32_t kTimedOut = 1;
constexpr std::uint32_t kSmallestAbort = 2;

// In pinned host memory that the device maps.  The host writes `abort`, the device everything else, so that no word is
// ever changed atomically from both sides, which not every bus allows.
struct ControlBlock {
  alignas(64) std::uint32_t abort;
  alignas(64) std::uint32_t claimed;  // by the first wait that gave up, before it records what follows
  std::uint32_t recorded;
  std::uint32_t code;
  std::uint32_t tag;
  std::uint32_t index;
  std::uint32_t expected;
  std::uint32_t seen;
};

constexpr int kWordsAtOnce = 32;  // one for each lane of a warp

struct WaitTask {
  const std::uint32_t* epoch;
  const std::uint32_t* words[kWordsAtOnce];
  std::int32_t values[kWordsAtOnce];
  int count;  // 0: nothing to wait for
  std::uint32_t first_index;
  std::uint32_t tag;
  std::uint32_t* aborted;
  ControlBlock* control;  // as the device sees it
  std::uint64_t timeout_ns;
};

struct SignalTask {
  const std::uint32_t* epoch;
  std::uint32_t* words[kWordsAtOnce];
  std::int32_t values[kWordsAtOnce];
  int count;
  const std::uint32_t* aborted;
};

// Times of the device's global clock.
struct LinkTask {
  std::uint64_t* busy_until;  // of the link
  std::uint64_t* over_at;     // of this stream's last piece
  std::uint64_t duration_ns;
};

// Rows of vectors of 16 bytes, between local memory, whose rows are a pitch apart, and dense rows behind a multicast
// address.
struct MultimemTask {
  std::uint64_t local;
  std::uint64_t multicast;
  std::uint64_t vectors;  // of a row
  std::uint64_t rows;
  std::uint64_t pitch;  // bytes
};

cudaError_t launch_wait(const WaitTask& task, cudaStream_t stream);
cudaError_t launch_signal(const SignalTask& task, cudaStream_t stream);
cudaError_t launch_advance(std::uint32_t* epoch, cudaStream_t stream);
// Waits until the link is free, and books it for `duration_ns` from then on.
cudaError_t launch_book(const LinkTask& task, cudaStream_t stream);
// Waits until *over_at.
cudaError_t launch_release(const std::uint64_t* over_at, cudaStream_t stream);

// The types must be a pair that with_types() knows, and the task laid out.
cudaError_t launch_reduce(const ReduceTask& task, const WaitTask& wait, DType source, DType out, Grid grid,
                          cudaStream_t stream);

// local = the sum of all ranks' memory.  Any type but fp64.
cudaError_t launch_multimem_reduce(const MultimemTask& task, DType dtype, Grid grid, cudaStream_t stream);
// All ranks' memory = local.
cudaError_t launch_multimem_store(const MultimemTask& task, Grid grid, cudaStream_t stream);

// All kernels of a file, for loading them before they are needed.
std::vector<const void*> signal_kernels();
std::vector<const void*> reduce_kernels();
std::vector<const void*> multimem_kernels();

}  // namespace odysseus
