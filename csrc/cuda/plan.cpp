#include "plan.h"

#include <algorithm>

namespace odysseus {
namespace {

constexpr int kBlock = 512;
constexpr int kLargeBlock = 1024;
// With the 64 registers of reduce_kernel, 1024 threads fill a multiprocessor.
constexpr int kBlocksPerMultiprocessor = 1024 / kBlock;
constexpr std::uint64_t kAccessesPerThread = 2;

bool aligned(std::uint64_t address, std::size_t alignment) { return address % alignment == 0; }

}  // namespace

CopyShape simplify(CopyShape shape) {
  if (shape.rows <= 1) {
    shape.dst_pitch = shape.src_pitch = shape.row_bytes;
  } else if (shape.dst_pitch == shape.row_bytes && shape.src_pitch == shape.row_bytes) {
    const std::size_t bytes = shape.row_bytes * shape.rows;
    shape = {bytes, 1, bytes, bytes};
  }
  return shape;
}

std::vector<CopyPart> link_pieces(const CopyShape& whole, std::size_t piece) {
  const CopyShape shape = simplify(whole);
  std::vector<CopyPart> parts;
  if (shape.row_bytes == 0 || shape.rows == 0) return parts;
  const std::size_t rows_at_once = piece / shape.row_bytes;
  if (rows_at_once > 0) {
    for (std::size_t row = 0; row < shape.rows; row += rows_at_once) {
      parts.push_back(
          {row * shape.dst_pitch, row * shape.src_pitch, shape.row_bytes, std::min(rows_at_once, shape.rows - row)});
    }
    return parts;
  }
  const std::size_t bytes_at_once = std::max(piece / kPieceAlignment * kPieceAlignment, kPieceAlignment);
  for (std::size_t row = 0; row < shape.rows; ++row) {
    for (std::size_t start = 0; start < shape.row_bytes; start += bytes_at_once) {
      parts.push_back({row * shape.dst_pitch + start, row * shape.src_pitch + start,
                       std::min(bytes_at_once, shape.row_bytes - start), 1});
    }
  }
  return parts;
}

void lay_out(ReduceTask& task, std::size_t source_size, std::size_t out_size) {
  bool dense = task.out_pitch == task.count * out_size;
  for (int i = 0; i < task.sources; ++i) dense = dense && task.source_pitch[i] == task.count * source_size;
  if (dense && task.rows > 1) {
    task.count *= task.rows;
    task.rows = 1;
    task.out_pitch = task.count * out_size;
    for (int i = 0; i < task.sources; ++i) task.source_pitch[i] = task.count * source_size;
  }
  const std::size_t width = kVectorBytes / source_size;
  const std::size_t out_alignment = std::min(width * out_size, kVectorBytes);
  const auto fits = [&](std::size_t head) {
    const bool pitched = task.rows > 1;
    if (!aligned(task.out + head * out_size, out_alignment)) return false;
    if (pitched && !aligned(task.out_pitch, out_alignment)) return false;
    for (int i = 0; i < task.sources; ++i) {
      if (!aligned(task.source[i] + head * source_size, kVectorBytes)) return false;
      if (pitched && !aligned(task.source_pitch[i], kVectorBytes)) return false;
    }
    return true;
  };
  task.head = 0;
  while (task.head < width && !fits(task.head)) ++task.head;
  if (task.head == width || task.head > task.count) {
    task.head = task.count;  // no 16-byte access suits all operands
  }
  task.vectors = (task.count - task.head) / width;
  task.tail = task.count - task.head - task.vectors * width;
}

Grid reduce_grid(std::uint64_t work, Share share, int multiprocessors, int cap) {
  // A sixteenth of the multiprocessors still reads faster than a link brings.  Beside products `cap` is what counts.
  const int limit = share == Share::kDevice   ? multiprocessors * kBlocksPerMultiprocessor
                    : share == Share::kBeside ? multiprocessors
                                              : multiprocessors / 16;
  const int threads = share == Share::kBeside ? kLargeBlock : kBlock;
  const std::uint64_t per_block = static_cast<std::uint64_t>(threads) * kAccessesPerThread;
  const std::uint64_t wanted = std::max<std::uint64_t>((work + per_block - 1) / per_block, 1);
  const int most = std::max(cap > 0 ? std::min(limit, cap) : limit, 1);
  return {static_cast<int>(std::min<std::uint64_t>(wanted, most)), threads};
}

}  // namespace odysseus
