// Copying text into and out of memory that other processes map.
#pragma once

#include <cstring>
#include <string>

#include "layout.h"

namespace odysseus {

// Cuts at the last whole UTF-8 character that leaves room for a terminating zero.
template <std::size_t Bytes>
void store_text(SharedText<Bytes>& shared, const std::string& text) {
  std::size_t length = text.size() < Bytes ? text.size() : Bytes - 1;
  if (length < text.size()) {
    while (length > 0 && (static_cast<unsigned char>(text[length]) & 0xc0) == 0x80) --length;
  }
  char bytes[Bytes] = {};
  std::memcpy(bytes, text.data(), length);
  for (std::size_t i = 0; i < Bytes / 8; ++i) {
    std::uint64_t word;
    std::memcpy(&word, bytes + 8 * i, 8);
    shared.words[i].store(word, std::memory_order_relaxed);
  }
}

template <std::size_t Bytes>
std::string load_text(const SharedText<Bytes>& shared) {
  char bytes[Bytes + 1] = {};
  for (std::size_t i = 0; i < Bytes / 8; ++i) {
    const std::uint64_t word = shared.words[i].load(std::memory_order_relaxed);
    std::memcpy(bytes + 8 * i, &word, 8);
  }
  return std::string(bytes);
}

}  // namespace odysseus
