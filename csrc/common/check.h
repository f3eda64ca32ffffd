// Checks whose messages print both operands, and the errors that the bindings turn into Python exceptions.
#pragma once

#include <cerrno>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <stdexcept>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>

namespace odysseus {

// A failed system call: OSError in Python, of the subclass that belongs to the errno.
struct OsError : std::runtime_error {
  OsError(int error_number, const std::string& message) : std::runtime_error(message), code(error_number) {}
  int code;
};

// The file system cannot back a segment: NoSpace in Python.
struct NoSpaceError : std::runtime_error {
  NoSpaceError(const std::string& message, std::uint64_t needed_bytes, std::uint64_t free_bytes)
      : std::runtime_error(message), needed(needed_bytes), free(free_bytes) {}
  std::uint64_t needed;
  std::uint64_t free;
};

// A descriptor that is not in the ring: LookupError in Python.
struct NotPostedError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Texts are put together without iostreams: beside torch 2.11 with CUDA 13.0 every message with a number in it was a
// segmentation fault where it was made of a stream (those without passed), and is none like this.  Streams look up how
// to print numbers in tables of the process, which other libraries may bring as well; that this is why is a guess.
template <class Part>
void append(std::string& text, const Part& part) {
  if constexpr (std::is_same_v<Part, bool> || std::is_integral_v<Part>) {
    text += std::is_same_v<Part, char> ? std::string(1, static_cast<char>(part)) : std::to_string(part);
  } else if constexpr (std::is_enum_v<Part>) {
    text += std::to_string(static_cast<std::underlying_type_t<Part>>(part));
  } else if constexpr (std::is_floating_point_v<Part>) {
    char digits[32];
    std::snprintf(digits, sizeof digits, "%g", static_cast<double>(part));
    text += digits;
  } else if constexpr (std::is_convertible_v<const Part&, std::string_view>) {
    text += std::string_view(part);
  } else {
    static_assert(std::is_pointer_v<Part>, "how is this printed?");
    char digits[32];
    std::snprintf(digits, sizeof digits, "%p", static_cast<const void*>(part));
    text += digits;
  }
}

template <class... Parts>
std::string concat(const Parts&... parts) {
  std::string text;
  (append(text, parts), ...);
  return text;
}

[[noreturn]] inline void throw_errno(int code, const std::string& what) {
  throw OsError(code, concat(what, ": ", std::strerror(code)));
}

}  // namespace odysseus

// ODY_CHECK(Exception, lhs, <, rhs, "what to do", ...): throws Exception naming the comparison and both values.
#define ODY_CHECK(Exception, lhs, op, rhs, ...)                                                                       \
  do {                                                                                                                \
    const auto ody_lhs = (lhs);                                                                                       \
    const auto ody_rhs = (rhs);                                                                                       \
    if (!(ody_lhs op ody_rhs)) {                                                                                      \
      throw Exception(::odysseus::concat("expected ", #lhs, " ", #op, " ", #rhs, ", got ", ody_lhs, " and ", ody_rhs, \
                                         ": ", __VA_ARGS__));                                                         \
    }                                                                                                                 \
  } while (0)

// Bad arguments (ValueError) and wrong states (RuntimeError).
#define ODY_CHECK_VALUE(lhs, op, rhs, ...) ODY_CHECK(std::invalid_argument, lhs, op, rhs, __VA_ARGS__)
#define ODY_CHECK_STATE(lhs, op, rhs, ...) ODY_CHECK(std::runtime_error, lhs, op, rhs, __VA_ARGS__)
