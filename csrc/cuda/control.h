// What ends the waits of a rank, and tells the host why.
#pragma once

#include <array>
#include <cstdint>
#include <mutex>
#include <optional>

#include "tasks.h"

namespace odysseus {

// code, tag, index, expected, seen
using WaitError = std::array<std::uint32_t, 5>;

class Control {
 public:
  // `aborted` is the device address of a uint32 that is zero now; it stays the caller's.
  Control(int device, std::uint64_t aborted);
  ~Control() { release(); }
  Control(const Control&) = delete;
  Control& operator=(const Control&) = delete;

  // Ends all waits of the rank; the first code stays.  No CUDA call, so that it works whatever the device does.
  void abort(std::int64_t code);

  // Of the first wait that gave up.  No CUDA call.
  std::optional<WaitError> error() const;

  // Gives the block back.  Nothing that waits may be running any more.  error() keeps its answer.
  void close() noexcept;

  int device() const { return device_; }
  std::uint32_t* aborted() const { return aborted_; }

  // The block as the device sees it; throws std::runtime_error once closed.
  ControlBlock* device_block() const;

 private:
  std::optional<WaitError> read() const;
  // Does not touch the block, which is gone if the context is.
  void release() noexcept;

  const int device_;
  std::uint32_t* const aborted_;
  mutable std::mutex mutex_;
  ControlBlock* host_ = nullptr;
  ControlBlock* mapped_ = nullptr;
  std::optional<WaitError> last_;
};

}  // namespace odysseus
