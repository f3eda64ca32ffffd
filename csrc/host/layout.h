// What a segment looks like.  Every process that maps one must be built from the same version of this file.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

namespace odysseus {

constexpr int kWindows = 16;
constexpr int kCells = 8;
constexpr int kDescriptors = 64;
constexpr int kMaxWorld = 1024;
constexpr std::size_t kReasonBytes = 512;
constexpr std::size_t kTextBytes = 384;
constexpr std::size_t kCacheLine = 64;

constexpr std::uint64_t kMagic = 0x6f64797373657573;  // "odysseus"
constexpr std::uint64_t kLayoutVersion = 2;

static_assert(std::atomic<std::uint64_t>::is_always_lock_free && std::atomic<std::uint32_t>::is_always_lock_free,
              "atomics are shared between processes, so they must not use locks");

// A signal.  `value` has exactly one writer, the rank that the word belongs to, and only grows.  `waiters` counts who
// sleeps on it in the kernel; a waiter killed asleep leaves it too high, which costs the writer idle wake-ups, no
// more.
struct alignas(kCacheLine) Word {
  std::atomic<std::uint64_t> value;
  std::atomic<std::uint32_t> waiters;
};
static_assert(sizeof(Word) == kCacheLine, "two words on one cache line would slow each other's writers down");

// Text that one process writes while others may read: whole atomic words, so that a torn read is stale, not undefined.
template <std::size_t Bytes>
struct SharedText {
  std::atomic<std::uint64_t> words[Bytes / 8];
};

// A posted call.  `seq` is 0 while the slot is being rewritten, so a reader that sees it twice unchanged has all of
// it.
struct alignas(kCacheLine) Descriptor {
  std::atomic<std::uint64_t> seq;
  std::atomic<std::uint64_t> hash;
  SharedText<kTextBytes> text;
};

// kFailed: gave up in the middle of its latest call.  kLeft: gave up between two calls, so all that it has posted is
// complete, and whoever waits in one of those calls does not wait for it.
enum class Status : std::uint64_t { kOpen = 1, kClosed = 2, kFailed = 3, kLeft = 4 };

struct Header {
  std::uint64_t magic;
  std::uint64_t version;
  std::uint64_t world;
  std::uint64_t rank;
  std::uint64_t nonce;
  std::uint64_t window_bytes;
  SharedText<kReasonBytes> reason;
  Word status;
  Word posted;
  Word step;  // number of the step that the rank is in; 0 outside of any
  Descriptor ring[kDescriptors];
  // Followed by, for each window and cell: one `ready` word, then one `done` word for each rank.
};

constexpr std::size_t round_up(std::size_t bytes, std::size_t unit) { return (bytes + unit - 1) / unit * unit; }

// Index of a word in the array after the header.
constexpr std::size_t ready_index(int world, int window, int cell) {
  return (static_cast<std::size_t>(window) * kCells + cell) * (1 + static_cast<std::size_t>(world));
}
constexpr std::size_t done_index(int world, int window, int cell, int reader) {
  return ready_index(world, window, cell) + 1 + static_cast<std::size_t>(reader);
}
constexpr std::size_t word_count(int world) { return ready_index(world, kWindows, 0); }

inline std::size_t header_bytes(int world, std::size_t page) {
  return round_up(sizeof(Header) + word_count(world) * sizeof(Word), page);
}

}  // namespace odysseus
