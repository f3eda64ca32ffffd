// Signal words: what a wait compares, on host and device alike.
//
// A word is a uint32.  Its values count within one use of the memory that it guards; beside it an epoch counts the
// uses, so that nothing of a call is a constant of the host and a captured graph can be replayed.
#pragma once

#include <cmath>
#include <cstdint>

#include "../common/dtype.h"

namespace odysseus {

constexpr std::uint32_t kWordsPerEpoch = 256;
// Beyond these a value would be one of another epoch but the last.
constexpr int kSmallestValue = -255;
constexpr int kLargestValue = 255;

// What a word holds, or is waited for, at `value` of `epoch`; wraps around.
HOST_DEVICE std::uint32_t word_of(std::uint32_t epoch, std::int32_t value) {
  return epoch * kWordsPerEpoch + static_cast<std::uint32_t>(value);
}

// Whether `seen` is `expected` or later, by the sign of the difference: right over wrap-around as long as the two are
// less than 2^31 apart.
HOST_DEVICE bool reached(std::uint32_t seen, std::uint32_t expected) {
  return static_cast<std::int32_t>(seen - expected) >= 0;
}

constexpr std::uint64_t kForever = ~std::uint64_t{0};

// A timeout for the device; infinity, and what a clock of 64 bits cannot tell from it, becomes kForever.
inline std::uint64_t nanoseconds(double seconds) {
  const double rounded = std::ceil(seconds * 1e9);
  return rounded >= 9.2e18 ? kForever : static_cast<std::uint64_t>(rounded);
}

}  // namespace odysseus
