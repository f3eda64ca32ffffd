// One rank's shared-memory segment: making it, opening a peer's, and finding words and windows in it.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "handles.h"
#include "layout.h"

namespace odysseus {

// What all ranks of a group must agree on.
struct GroupShape {
  int world;
  std::size_t window_bytes;
  std::uint64_t nonce;
};

class Segment {
 public:
  // Makes a nameless file in `directory`, so that nothing is left behind whenever the process is killed, and holds the
  // lock that tells peers it is alive.  The header is backed with memory at once, windows as they are reserved.
  static Segment create(const std::string& directory, int rank, const GroupShape& shape);

  // Opens and verifies the segment that `rank` made; throws std::runtime_error naming what differs.
  //
  // Never to be called on a segment of the own process: closing any second descriptor of a file drops all POSIX locks
  // that the process holds on it, after which every peer would take this rank for dead.
  static Segment open(const std::string& path, int rank, const GroupShape& shape);

  Header& header() const { return *reinterpret_cast<Header*>(mapping_->data()); }
  Word& ready(int window, int cell) const { return words()[ready_index(world_, window, cell)]; }
  Word& done(int window, int cell, int reader) const { return words()[done_index(world_, window, cell, reader)]; }
  Word& word(std::size_t index) const { return words()[index]; }
  std::size_t window_offset(int window) const { return header_bytes_ + window_bytes_ * window; }
  Status status() const { return static_cast<Status>(header().status.value.load(std::memory_order_acquire)); }

  const std::shared_ptr<Mapping>& mapping() const { return mapping_; }
  int fd() const { return fd_.get(); }

  // Whether the process that made the segment still holds its lock; meaningless (false) for the own segment.
  bool locked() const;

  // Gives up the descriptor and with it the lock.  The mapping stays.
  void drop_fd() { fd_.reset(); }

 private:
  Segment(UniqueFd fd, const GroupShape& shape);
  Word* words() const { return reinterpret_cast<Word*>(mapping_->data() + sizeof(Header)); }

  UniqueFd fd_;
  std::shared_ptr<Mapping> mapping_;
  int world_;
  std::size_t window_bytes_;
  std::size_t header_bytes_;
};

// Backs bytes [offset, offset + bytes) of the file with memory.  Throws NoSpaceError where the file system is full
// (`what` names the user), returns false where a signal handler interrupted it.
bool allocate(int fd, std::size_t offset, std::size_t bytes, const std::string& what);

std::size_t page_size();

}  // namespace odysseus
