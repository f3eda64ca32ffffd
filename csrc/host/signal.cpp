#include "signal.h"

#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <climits>
#include <ctime>

#include "../common/check.h"

namespace odysseus {
namespace {

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the futex is the first half of the 64-bit value");

// A futex is 32 bits wide: the low half of the value, which changes with every publication less than 2^32 apart.
// Not FUTEX_PRIVATE_FLAG, which would key it by address space and never meet the other processes.
long futex(std::atomic<std::uint64_t>& value, int operation, std::uint32_t argument, const timespec* timeout) {
  return ::syscall(SYS_futex, reinterpret_cast<std::uint32_t*>(&value), operation, argument, timeout, nullptr, 0);
}

inline void pause() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield" ::: "memory");
#endif
}

}  // namespace

void wake(Word& word) {
  // Pairs with the waiter's count-then-look in sleep(): both sides are sequentially consistent, so either the waiter
  // sees the new value or this load sees the waiter.
  if (word.waiters.load(std::memory_order_seq_cst) > 0) futex(word.value, FUTEX_WAKE, INT_MAX, nullptr);
}

void publish(Word& word, std::uint64_t value) {
  word.value.store(value, std::memory_order_seq_cst);
  wake(word);
}

bool spin(const Word& word, std::uint64_t expected, Clock::time_point until) {
  do {
    // The clock costs as much as several looks, so it is read once for a handful of them.
    for (int look = 0; look < 16; ++look) {
      if (reached(word, expected)) return true;
      pause();
    }
  } while (Clock::now() < until);
  return reached(word, expected);
}

void sleep(Word& word, std::uint64_t expected, Clock::time_point until) {
  const auto left = std::chrono::duration_cast<std::chrono::nanoseconds>(until - Clock::now()).count();
  if (left <= 0) return;
  const timespec timeout{static_cast<time_t>(left / 1'000'000'000), static_cast<long>(left % 1'000'000'000)};
  word.waiters.fetch_add(1, std::memory_order_seq_cst);
  const std::uint64_t seen = word.value.load(std::memory_order_seq_cst);
  int error = 0;
  if (seen < expected && futex(word.value, FUTEX_WAIT, static_cast<std::uint32_t>(seen), &timeout) != 0) {
    error = errno;
  }
  word.waiters.fetch_sub(1, std::memory_order_seq_cst);
  if (error != 0 && error != EAGAIN && error != EINTR && error != ETIMEDOUT) throw_errno(error, "futex wait");
}

}  // namespace odysseus
