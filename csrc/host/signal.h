// Publishing and awaiting signal words across processes.
#pragma once

#include <chrono>
#include <cstdint>

#include "layout.h"

namespace odysseus {

using Clock = std::chrono::steady_clock;

inline bool reached(const Word& word, std::uint64_t expected) {
  return word.value.load(std::memory_order_acquire) >= expected;
}

// Wakes whoever sleeps on the word, without changing it.
void wake(Word& word);

// Makes everything written before visible to whoever then sees `value`, and wakes who waits for it.
void publish(Word& word, std::uint64_t value);

// Spins until the word reaches `expected` or `until` has passed; says whether it did.
bool spin(const Word& word, std::uint64_t expected, Clock::time_point until);

// Sleeps in the kernel until the word changes, somebody wakes it, a signal handler ran or `until` has passed.
// Returns at once where the word has reached `expected`.  May return early for no reason: look again.
void sleep(Word& word, std::uint64_t expected, Clock::time_point until);

}  // namespace odysseus
