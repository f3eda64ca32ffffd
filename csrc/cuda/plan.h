// How copies and reductions are cut up: pure functions of sizes and addresses, tested without a device.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "reduce_worker.h"

namespace odysseus {

// `rows` rows of `row_bytes` bytes, a pitch apart.
struct CopyShape {
  std::size_t row_bytes;
  std::size_t rows;
  std::size_t dst_pitch;
  std::size_t src_pitch;
};

// A part of a copy, with the copy's pitches.
struct CopyPart {
  std::size_t dst_offset;
  std::size_t src_offset;
  std::size_t row_bytes;
  std::size_t rows;
};

// The same copy with as few rows as possible: dense rows are one, and pitches that do not matter are row_bytes.
CopyShape simplify(CopyShape shape);

constexpr std::size_t kLinkPiece = std::size_t{8} << 20;
constexpr std::size_t kPieceAlignment = 4096;

// Parts of about `piece` bytes, in order: whole rows while a row is smaller than that, and multiples of
// kPieceAlignment (but for the last) within rows that are not.
std::vector<CopyPart> link_pieces(const CopyShape& shape, std::size_t piece = kLinkPiece);

// Where the elements of a reduction's rows are for 16-byte accesses: sets `head`, `vectors` and `tail` of a task whose
// addresses, pitches, rows and count are set.  Dense rows become one.
void lay_out(ReduceTask& task, std::size_t source_size, std::size_t out_size);

// Loads of each source that a laid out task needs.
inline std::uint64_t accesses(const ReduceTask& task) { return (task.head + task.vectors + task.tail) * task.rows; }

// How many blocks run a reduction.
struct Grid {
  int blocks;
  int threads;
};

enum class Share {
  kDevice,   // alone on the device
  kBeside,   // beside products: each block fills a multiprocessor, so that those it does not hold are left alone
  kWaiting,  // blocks that wait: few enough to be resident beside other work and other ranks on the same device
};

// `work` is the number of accesses (vectors or single elements) of each operand; `cap` is the most blocks, 0 for any.
Grid reduce_grid(std::uint64_t work, Share share, int multiprocessors, int cap);

}  // namespace odysseus
