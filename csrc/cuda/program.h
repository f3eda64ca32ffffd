// A recording that can be enqueued on a device's streams.
#pragma once

#include <cuda_runtime_api.h>

#include <memory>
#include <vector>

#include "control.h"
#include "enqueuer.h"

namespace odysseus {

// Frees what it owns on its device; never throws, and survives a context that is gone.
struct EventDeleter {
  int device;
  void operator()(cudaEvent_t event) const noexcept;
};
struct MemoryDeleter {
  int device;
  void operator()(void* memory) const noexcept;
};
using UniqueEvent = std::unique_ptr<std::remove_pointer_t<cudaEvent_t>, EventDeleter>;
using UniqueMemory = std::unique_ptr<void, MemoryDeleter>;

class Program : public Recording {
 public:
  // `link` is the rate in bytes/s of copies over the emulated link, 0 for none.
  Program(std::shared_ptr<Control> control, int device, double link);

  // Checks all arguments of operations [first, last), which the pass then enqueues, in ranges if need be.  It refers to
  // the program and to both vectors.
  std::unique_ptr<Pass> begin(std::int64_t first, std::int64_t last, const std::vector<std::uint64_t>& streams,
                              const std::vector<std::uint64_t>& bases, double timeout_s);

  // Enqueues operations [first, last).  All arguments are checked before the first is enqueued.
  void run(std::int64_t first, std::int64_t last, const std::vector<std::uint64_t>& streams,
           const std::vector<std::uint64_t>& bases, double timeout_s);

  // Gives back events and memory.  Nothing of the program may be running any more.
  void close();

 private:
  friend class ProgramPass;

  cudaEvent_t event(int index);

  const std::shared_ptr<Control> control_;
  const int device_;
  const double link_;
  int multiprocessors_ = 0;
  bool closed_ = false;
  std::vector<UniqueEvent> events_;
  // The link's clock, then for each stream the time when its last piece is over; null without a link.
  UniqueMemory clocks_;
};

}  // namespace odysseus
