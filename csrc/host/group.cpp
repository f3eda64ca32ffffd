// Liveness, waking and leaving of a group, and the waits on it.
#include <unistd.h>

#include <algorithm>
#include <cmath>

#include "../common/check.h"
#include "symmetric_host.h"

namespace odysseus {
namespace {

constexpr auto kSlice = std::chrono::milliseconds(20);
constexpr double kLongestWait_s = 1e9;  // beyond it steady_clock's arithmetic could overflow

}  // namespace

Group::Group(int rank_, const GroupShape& shape_, const std::string& directory_)
    : rank(rank_),
      shape(shape_),
      directory(directory_),
      creator(::getpid()),
      own(Segment::create(directory_, rank_, shape_)) {}

Group::~Group() { close(); }

bool Group::in_creator() const { return ::getpid() == creator; }

void Group::wake_all() const {
  wake(own.header().status);
  wake(own.header().posted);
  for (std::size_t index = 0; index < word_count(shape.world); ++index) wake(own.word(index));
  // The `done` words that this rank writes lie in its peers' segments.
  for (const auto& peer : peers) {
    if (!peer) continue;
    for (int window = 0; window < kWindows; ++window) {
      for (int cell = 0; cell < kCells; ++cell) wake(peer->done(window, cell, rank));
    }
  }
}

std::optional<WaitOutcome> Group::find_broken(int awaited) const {
  std::optional<int> failed;
  std::optional<int> ahead;
  if (own.status() == Status::kFailed || own.status() == Status::kLeft) failed = rank;
  const std::uint64_t call = own.header().posted.value.load(std::memory_order_relaxed);
  const std::uint64_t own_step = own.header().step.value.load(std::memory_order_relaxed);
  for (int step = 0; step < static_cast<int>(peers.size()); ++step) {
    const int peer = (awaited + step) % shape.world;
    if (!peers[peer]) continue;
    // The lock before the status: a peer that closes sets its status first, so this order never calls it vanished.
    const bool locked = peers[peer]->locked();
    const Status status = peers[peer]->status();
    const Header& header = peers[peer]->header();
    // Read before `posted`: a step begins behind the calls of the one before.
    const std::uint64_t peer_step = header.step.value.load(std::memory_order_seq_cst);
    const bool behind = header.posted.value.load(std::memory_order_seq_cst) < call;
    if (peer_step > own_step && behind && !ahead) ahead = peer;
    if (status == Status::kLeft) {
      if (!failed && behind) failed = peer;
    } else if (status == Status::kFailed) {
      if (!failed) failed = peer;
    } else if (status == Status::kClosed ? peer == awaited : !locked) {
      return WaitOutcome{"lost", peer};
    }
  }
  if (failed) return WaitOutcome{"failed", *failed};
  if (ahead) return WaitOutcome{"ahead", *ahead};
  return std::nullopt;
}

void Group::close() {
  if (closed.exchange(true)) return;
  // A forked child shares the memory but not the membership: it only lets go of its copies of the descriptors, when
  // they are destroyed.  Nor may it take the mutex, which another thread can have held at the moment of the fork.
  if (!in_creator()) return;
  if (own.status() == Status::kOpen) {
    own.header().status.value.store(static_cast<std::uint64_t>(Status::kClosed), std::memory_order_seq_cst);
  }
  wake_all();
  const std::lock_guard<std::mutex> guard(own_mutex);
  own.drop_fd();
}

Wait::Wait(std::shared_ptr<Group> group, Word& word, std::uint64_t value, int awaited, double timeout_s,
           std::uint32_t spin_us)
    : group_(std::move(group)), word_(&word), value_(value), awaited_(awaited), spin_us_(spin_us) {
  ODY_CHECK_VALUE(timeout_s, >=, 0.0, "timeout_s counts seconds");
  const std::chrono::duration<double> timeout(std::min(timeout_s, kLongestWait_s));
  deadline_ = Clock::now() + std::chrono::duration_cast<Clock::duration>(timeout);
}

std::optional<WaitOutcome> Wait::step() {
  const auto start = Clock::now();
  const auto spin_end = std::min(deadline_, start + std::chrono::microseconds(std::exchange(spin_us_, 0)));
  if (spin(*word_, value_, spin_end)) return success();
  sleep(*word_, value_, std::min(deadline_, start + kSlice));
  if (satisfied()) return success();

  if (group_->closed) throw std::runtime_error("this rank closed its SymmetricHost while it was waiting on it");
  const auto broken = group_->find_broken(awaited_);
  // What was published before a peer broke is there, even if it came between the look at the word and that at the
  // peer.
  if (broken) return satisfied() ? success() : *broken;
  if (Clock::now() >= deadline_) return satisfied() ? success() : WaitOutcome{"timeout", awaited_};
  return std::nullopt;
}

}  // namespace odysseus
