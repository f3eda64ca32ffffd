// Waiting for words, by one warp: the body of the wait kernel, and of reductions that wait for their sources.
#pragma once

#include "device.cuh"
#include "tasks.h"

namespace odysseus {

constexpr unsigned kWholeWarp = 0xffffffffu;
constexpr std::uint32_t kGoOn = 0;
constexpr std::uint32_t kDrain = 0xffffffffu;  // no code: another wait has given up and recorded why
// Reading the host's word takes a round trip over the bus, which must not delay the sight of a signal often.
constexpr std::uint64_t kLookAtHostEvery = 8000;  // ns

// Records the first error and ends all waits.
__device__ __forceinline__ void give_up(const WaitTask& task, std::uint32_t code, std::uint32_t index,
                                        std::uint32_t expected, std::uint32_t seen) {
  ControlBlock* control = task.control;
  // Device scope is enough: all waits of a rank run on its device, and the host only reads.
  if (atomicCAS(&control->claimed, 0u, 1u) == 0u) {
    control->code = code;
    control->tag = task.tag;
    control->index = index;
    control->expected = expected;
    control->seen = seen;
    store_release_system(&control->recorded, 1u);
  }
  // Not only by the first: what follows in this stream must not signal even if the first has not come so far yet.
  store_release_device(task.aborted, 1u);
}

// Whether the rank's waits end; asked of one lane.
__device__ __forceinline__ std::uint32_t verdict(const WaitTask& task, std::uint64_t begin, std::uint64_t& next_look) {
  if (load_acquire_device(task.aborted) != 0) return kDrain;
  const std::uint64_t now = global_time();
  if (now >= next_look) {
    next_look = now + kLookAtHostEvery;
    const std::uint32_t code = load_relaxed_system(&task.control->abort);
    if (code != 0) return code;
  }
  return task.timeout_ns != kForever && now - begin >= task.timeout_ns ? kTimedOut : kGoOn;
}

// Returns once all words are there, or the rank gives up.  To be called by a whole warp; what the words guard may then
// be read by its lanes, and by threads that they synchronize with.
__device__ __forceinline__ void wait_in_warp(const WaitTask& task, int lane) {
  const bool mine = lane < task.count;
  const std::uint32_t expected = mine ? word_of(*task.epoch, task.values[lane]) : 0;
  const std::uint64_t begin = global_time();
  std::uint64_t next_look = begin;
  unsigned pause = 32;
  while (true) {
    const std::uint32_t seen = mine ? load_acquire_system(task.words[lane]) : 0;
    const unsigned missing = __ballot_sync(kWholeWarp, mine && !reached(seen, expected));
    if (missing == 0) return;
    std::uint32_t code = lane == 0 ? verdict(task, begin, next_look) : kGoOn;
    code = __shfl_sync(kWholeWarp, code, 0);
    if (code != kGoOn) {
      // A peer may have signalled and ended in order between the two looks.
      const std::uint32_t again = mine ? load_acquire_system(task.words[lane]) : 0;
      if (__ballot_sync(kWholeWarp, mine && !reached(again, expected)) == 0) return;
      if (code != kDrain && lane == __ffs(missing) - 1) {
        give_up(task, code, task.first_index + lane, expected, seen);
      }
      __syncwarp();
      return;
    }
    __nanosleep(pause);
    pause = pause < 256 ? 2 * pause : pause;
  }
}

}  // namespace odysseus
