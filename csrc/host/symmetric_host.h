// One rank's end of a group of shared-memory segments: buffers, signals, call descriptors and liveness.
#pragma once

#include <sys/types.h>

#include <array>
#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "segment.h"
#include "signal.h"

namespace odysseus {

// The end of a wait: what happened, and the rank it happened to.
struct WaitOutcome {
  const char* status;  // "ok", "timeout", "lost", "failed" or "ahead"
  int rank;
};

// A group as one rank sees it.  Threads that wait share ownership, so that closing under them pulls nothing away.
struct Group {
  Group(int rank, const GroupShape& shape, const std::string& directory);
  ~Group();
  Group(const Group&) = delete;
  Group& operator=(const Group&) = delete;

  bool in_creator() const;
  void wake_all() const;
  // First rank of all that can no longer take part: a vanished one before one that gave up, which may have done so
  // because of it, and that before one that is in a later step without having begun the call that this rank is in.  A
  // peer that closed in good order only matters to those who wait for it.
  std::optional<WaitOutcome> find_broken(int awaited) const;
  void close();

  const int rank;
  const GroupShape shape;
  const std::string directory;
  const pid_t creator;
  Segment own;
  std::vector<std::optional<Segment>> peers;  // empty until attached; the own entry stays empty
  std::mutex own_mutex;                       // guards the own descriptor and `reserved`
  std::array<std::size_t, kWindows> reserved{};
  std::atomic<bool> closed{false};
};

// A wait in progress, cut into slices so that its caller can look after signal handlers in between.
class Wait {
 public:
  Wait(std::shared_ptr<Group> group, Word& word, std::uint64_t value, int awaited, double timeout_s,
       std::uint32_t spin_us);

  bool satisfied() const { return reached(*word_, value_); }
  WaitOutcome success() const { return {"ok", awaited_}; }
  // Waits for about 20 ms at most; nothing means that the wait goes on.
  std::optional<WaitOutcome> step();

 private:
  std::shared_ptr<Group> group_;
  Word* word_;
  std::uint64_t value_;
  int awaited_;
  std::uint32_t spin_us_;
  Clock::time_point deadline_;
};

// Bytes of one window, and the mapping they lie in.
struct Window {
  std::shared_ptr<Mapping> mapping;
  std::byte* data;
  std::size_t bytes;
};

// See odysseus_kernels/_C.pyi, which documents every method.  Not for concurrent use except through the Wait objects
// it hands out and reserve(): the interpreter's lock serialises the rest.
class SymmetricHost {
 public:
  SymmetricHost(int rank, int world, const std::string& directory, std::uint64_t window_bytes, std::uint64_t nonce);
  ~SymmetricHost() { close(); }

  int rank() const { return rank_; }
  int world() const { return shape_.world; }
  std::size_t window_bytes() const { return shape_.window_bytes; }
  std::uint64_t nonce() const { return shape_.nonce; }
  bool closed() const { return group_ == nullptr; }
  std::uint32_t spin_us() const { return spin_us_; }
  void set_spin_us(std::uint32_t microseconds) { spin_us_ = microseconds; }

  std::string path() const;
  void attach(const std::vector<std::string>& paths);
  std::shared_ptr<Group> group() const { return open_group(); }
  // Static and on the group, because it runs without the interpreter's lock; false where a signal handler ran.
  static bool reserve(Group& group, int window, std::uint64_t bytes);
  std::size_t reserved(int window) const;
  Window window(int rank, int window) const;

  void set_ready(int window, int cell, std::uint64_t value);
  void set_done(int owner, int window, int cell, std::uint64_t value);
  Wait wait_ready(int owner, int window, int cell, std::uint64_t value, double timeout_s) const;
  Wait wait_done(int reader, int window, int cell, std::uint64_t value, double timeout_s) const;
  Wait wait_posted(int peer, std::uint64_t seq, double timeout_s) const;
  std::uint64_t ready(int owner, int window, int cell) const;
  std::uint64_t done(int owner, int reader, int window, int cell) const;

  void post(std::uint64_t seq, std::uint64_t hash, const std::string& text);
  std::uint64_t posted(int peer) const;
  std::pair<std::uint64_t, std::string> descriptor(int peer, std::uint64_t seq) const;

  void set_step(std::uint64_t number);
  std::uint64_t step(int rank) const;

  void fail(const std::string& text) { give_up(Status::kFailed, text); }
  void leave(const std::string& text) { give_up(Status::kLeft, text); }
  std::string reason(int rank) const;
  bool alive(int rank) const;
  void close();

 private:
  void give_up(Status status, const std::string& text);
  std::shared_ptr<Group> open_group() const;
  // The segment of a rank, checked for range and attachment.
  const Segment& segment(const Group& group, int rank) const;

  int rank_;
  GroupShape shape_;
  std::uint32_t spin_us_ = 50;
  std::shared_ptr<Group> group_;
};

}  // namespace odysseus
