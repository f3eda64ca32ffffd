#include "symmetric_host.h"

#include <unistd.h>

#include "../common/check.h"
#include "shared_text.h"

namespace odysseus {
namespace {

constexpr std::uint64_t kMaxWindowBytes = std::uint64_t{1} << 40;  // address space is finite: 47 bits on x86-64

GroupShape checked_shape(int rank, int world, std::uint64_t window_bytes, std::uint64_t nonce) {
  ODY_CHECK_VALUE(world, >=, 1, "a group has at least one rank");
  ODY_CHECK_VALUE(world, <=, kMaxWorld, "a group on one host is smaller");
  ODY_CHECK_VALUE(rank, >=, 0, "ranks count from 0");
  ODY_CHECK_VALUE(rank, <, world, "ranks count from 0 to world - 1");
  ODY_CHECK_VALUE(window_bytes, >=, 1u, "a window holds at least one byte");
  ODY_CHECK_VALUE(window_bytes, <=, kMaxWindowBytes, "give each window less address space");
  return {world, round_up(window_bytes, page_size()), nonce};
}

void check_window(int window) {
  ODY_CHECK_VALUE(window, >=, 0, "windows count from 0");
  ODY_CHECK_VALUE(window, <, kWindows, "windows count from 0 to WINDOWS - 1");
}

void check_cell(int window, int cell) {
  check_window(window);
  ODY_CHECK_VALUE(cell, >=, 0, "cells count from 0");
  ODY_CHECK_VALUE(cell, <, kCells, "cells count from 0 to CELLS - 1");
}

void raise_signal(Word& word, std::uint64_t value) {
  const std::uint64_t current = word.value.load(std::memory_order_relaxed);
  ODY_CHECK_VALUE(value, >=, current, "a signal only grows");
  publish(word, value);
}

}  // namespace

SymmetricHost::SymmetricHost(int rank, int world, const std::string& directory, std::uint64_t window_bytes,
                             std::uint64_t nonce)
    : rank_(rank),
      shape_(checked_shape(rank, world, window_bytes, nonce)),
      group_(std::make_shared<Group>(rank, shape_, directory)) {}

std::shared_ptr<Group> SymmetricHost::open_group() const {
  if (!group_) throw std::runtime_error(concat("the SymmetricHost of rank ", rank_, " is closed"));
  if (!group_->in_creator()) {
    throw std::runtime_error(concat("this SymmetricHost belongs to process ", group_->creator,
                                    ", not to its forked child ", ::getpid(),
                                    ": communicate from the process that made it"));
  }
  return group_;
}

const Segment& SymmetricHost::segment(const Group& group, int rank) const {
  ODY_CHECK_VALUE(rank, >=, 0, "ranks count from 0");
  ODY_CHECK_VALUE(rank, <, shape_.world, "ranks count from 0 to world - 1");
  if (rank == rank_) return group.own;
  if (group.peers.empty()) {
    throw std::runtime_error(
        concat("rank ", rank_, " has not attached rank ", rank, "'s segment: call attach() first"));
  }
  return *group.peers[static_cast<std::size_t>(rank)];
}

std::string SymmetricHost::path() const {
  const auto group = open_group();
  return concat("/proc/", group->creator, "/fd/", group->own.fd());
}

void SymmetricHost::attach(const std::vector<std::string>& paths) {
  const auto group = open_group();
  ODY_CHECK_VALUE(static_cast<int>(paths.size()), ==, shape_.world, "attach() takes one path for each rank");
  if (!group->peers.empty()) throw std::runtime_error(concat("rank ", rank_, " is attached already"));
  const std::string own_process = concat("/proc/", group->creator, "/");
  std::vector<std::optional<Segment>> peers(paths.size());
  for (int peer = 0; peer < shape_.world; ++peer) {
    const std::string& path = paths[static_cast<std::size_t>(peer)];
    if (peer == rank_) continue;
    // See Segment::open: opening and closing a segment of this process would drop the lock that proves it alive.
    if (path.rfind(own_process, 0) == 0 || path.rfind("/proc/self/", 0) == 0) {
      throw std::runtime_error(concat("ranks ", rank_, " and ", peer, " are both in process ", group->creator, " (",
                                      path, "): expected a process for each rank"));
    }
    peers[static_cast<std::size_t>(peer)].emplace(Segment::open(path, peer, shape_));
  }
  group->peers = std::move(peers);
}

bool SymmetricHost::reserve(Group& group, int window, std::uint64_t bytes) {
  check_window(window);
  const std::string what = concat("window ", window, " of rank ", group.rank, " in ", group.directory);
  if (bytes > group.shape.window_bytes) {
    throw NoSpaceError(concat(what, " needs ", bytes, " bytes, but was made for ", group.shape.window_bytes), bytes,
                       group.shape.window_bytes);
  }
  const std::lock_guard<std::mutex> guard(group.own_mutex);
  if (group.closed) throw std::runtime_error(concat("the SymmetricHost of rank ", group.rank, " is closed"));
  std::size_t& reserved = group.reserved[static_cast<std::size_t>(window)];
  const std::size_t wanted = round_up(bytes, page_size());
  if (wanted <= reserved) return true;
  if (!allocate(group.own.fd(), group.own.window_offset(window) + reserved, wanted - reserved, what)) return false;
  reserved = wanted;
  return true;
}

std::size_t SymmetricHost::reserved(int window) const {
  const auto group = open_group();
  check_window(window);
  const std::lock_guard<std::mutex> guard(group->own_mutex);
  return group->reserved[static_cast<std::size_t>(window)];
}

Window SymmetricHost::window(int rank, int window) const {
  const auto group = open_group();
  check_window(window);
  const Segment& owner = segment(*group, rank);
  return {owner.mapping(), owner.mapping()->data() + owner.window_offset(window), shape_.window_bytes};
}

void SymmetricHost::set_ready(int window, int cell, std::uint64_t value) {
  const auto group = open_group();
  check_cell(window, cell);
  raise_signal(group->own.ready(window, cell), value);
}

void SymmetricHost::set_done(int owner, int window, int cell, std::uint64_t value) {
  const auto group = open_group();
  check_cell(window, cell);
  raise_signal(segment(*group, owner).done(window, cell, rank_), value);
}

Wait SymmetricHost::wait_ready(int owner, int window, int cell, std::uint64_t value, double timeout_s) const {
  auto group = open_group();
  check_cell(window, cell);
  Word& word = segment(*group, owner).ready(window, cell);
  return Wait(std::move(group), word, value, owner, timeout_s, spin_us_);
}

Wait SymmetricHost::wait_done(int reader, int window, int cell, std::uint64_t value, double timeout_s) const {
  auto group = open_group();
  check_cell(window, cell);
  segment(*group, reader);  // checks the reader: one that is not attached could never answer
  Word& word = group->own.done(window, cell, reader);
  return Wait(std::move(group), word, value, reader, timeout_s, spin_us_);
}

Wait SymmetricHost::wait_posted(int peer, std::uint64_t seq, double timeout_s) const {
  auto group = open_group();
  Word& word = segment(*group, peer).header().posted;
  return Wait(std::move(group), word, seq, peer, timeout_s, spin_us_);
}

std::uint64_t SymmetricHost::ready(int owner, int window, int cell) const {
  const auto group = open_group();
  check_cell(window, cell);
  return segment(*group, owner).ready(window, cell).value.load(std::memory_order_acquire);
}

std::uint64_t SymmetricHost::done(int owner, int reader, int window, int cell) const {
  const auto group = open_group();
  check_cell(window, cell);
  segment(*group, reader);
  return segment(*group, owner).done(window, cell, reader).value.load(std::memory_order_acquire);
}

void SymmetricHost::post(std::uint64_t seq, std::uint64_t hash, const std::string& text) {
  const auto group = open_group();
  Header& header = group->own.header();
  const std::uint64_t latest = header.posted.value.load(std::memory_order_relaxed);
  ODY_CHECK_VALUE(seq, >, latest, "descriptors are posted in growing order, from 1");
  Descriptor& slot = header.ring[seq % kDescriptors];
  slot.seq.store(0, std::memory_order_relaxed);
  std::atomic_thread_fence(std::memory_order_release);
  slot.hash.store(hash, std::memory_order_relaxed);
  store_text(slot.text, text);
  slot.seq.store(seq, std::memory_order_release);
  publish(header.posted, seq);
}

std::uint64_t SymmetricHost::posted(int peer) const {
  const auto group = open_group();
  return segment(*group, peer).header().posted.value.load(std::memory_order_acquire);
}

std::pair<std::uint64_t, std::string> SymmetricHost::descriptor(int peer, std::uint64_t seq) const {
  const auto group = open_group();
  const Header& header = segment(*group, peer).header();
  const std::uint64_t latest = header.posted.value.load(std::memory_order_acquire);
  const Descriptor& slot = header.ring[seq % kDescriptors];
  const std::uint64_t before = slot.seq.load(std::memory_order_acquire);
  const std::uint64_t hash = slot.hash.load(std::memory_order_relaxed);
  std::string text = load_text(slot.text);
  std::atomic_thread_fence(std::memory_order_acquire);
  const std::uint64_t after = slot.seq.load(std::memory_order_relaxed);
  if (seq == 0 || before != seq || after != seq) {
    throw NotPostedError(concat("descriptor ", seq, " of rank ", peer, ": expected it in the ring, found ", after,
                                " in its slot; the latest posted is ", latest, " and the last ", kDescriptors,
                                " are kept"));
  }
  return {hash, std::move(text)};
}

void SymmetricHost::set_step(std::uint64_t number) {
  const auto group = open_group();
  raise_signal(group->own.header().step, number);
}

std::uint64_t SymmetricHost::step(int rank) const {
  const auto group = open_group();
  return segment(*group, rank).header().step.value.load(std::memory_order_acquire);
}

void SymmetricHost::give_up(Status status, const std::string& text) {
  const auto group = open_group();
  if (group->own.status() != Status::kOpen) return;
  Header& header = group->own.header();
  store_text(header.reason, text);
  publish(header.status, static_cast<std::uint64_t>(status));
  group->wake_all();
}

std::string SymmetricHost::reason(int rank) const {
  const auto group = open_group();
  const Segment& owner = segment(*group, rank);
  const Status status = owner.status();
  return status == Status::kFailed || status == Status::kLeft ? load_text(owner.header().reason) : std::string();
}

bool SymmetricHost::alive(int rank) const {
  const auto group = open_group();
  const Segment& owner = segment(*group, rank);
  if (owner.status() == Status::kClosed) return false;
  return rank == rank_ || owner.locked();
}

void SymmetricHost::close() {
  if (group_) group_->close();
  group_.reset();
}

}  // namespace odysseus
