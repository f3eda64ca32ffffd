// What one thread does for a copy over an emulated link, for host and device, so that its indices are tested on a CPU.
//
// A copy is cut into blocks of at most kLinkBlock bytes, none of which crosses a row.  Threads that work together copy
// a block at once, and blocks are due one after another, as bytes come out of a link.
#pragma once

#include "reduce_worker.h"

namespace odysseus {

constexpr std::uint64_t kLinkBlock = 64 << 10;
constexpr int kLinkThreads = 512;
// Accesses of a thread that are in flight together: a whole block, by kLinkThreads threads.
constexpr int kLinkDepth = static_cast<int>(kLinkBlock / kVectorBytes / kLinkThreads);

// Rows at raw addresses; pitches and sizes in bytes.
struct LinkCopyTask {
  std::uint64_t dst;
  std::uint64_t src;
  std::uint64_t dst_pitch;
  std::uint64_t src_pitch;
  std::uint64_t row_bytes;
  std::uint64_t rows;
  // Times of the device's global clock: when the link is done with the copy, and for how long it is busy with it.
  const std::uint64_t* over_at;
  std::uint64_t duration_ns;
};

HOST_DEVICE std::uint64_t blocks_of_row(const LinkCopyTask& task) {
  return (task.row_bytes + kLinkBlock - 1) / kLinkBlock;
}

HOST_DEVICE std::uint64_t link_blocks(const LinkCopyTask& task) { return task.rows * blocks_of_row(task); }

// When block `index` may begin, from the moment on at which the link begins with the copy.
HOST_DEVICE std::uint64_t block_due_ns(const LinkCopyTask& task, std::uint64_t index) {
  const std::uint64_t total = link_blocks(task);
  return task.duration_ns / total * index + task.duration_ns % total * index / total;
}

HOST_DEVICE void copy_byte(std::uint64_t dst, std::uint64_t src) {
#if defined(__CUDA_ARCH__)
  std::uint32_t byte;
  asm volatile("ld.global.u8 %0, [%1];" : "=r"(byte) : "l"(src) : "memory");
  asm volatile("st.global.u8 [%0], %1;" ::"l"(dst), "r"(byte) : "memory");
#else
  memcpy(reinterpret_cast<void*>(dst), reinterpret_cast<const void*>(src), 1);
#endif
}

// The share of thread `worker` out of `workers` in block `index`.
HOST_DEVICE void copy_block(const LinkCopyTask& task, std::uint64_t index, std::uint32_t worker, std::uint32_t workers) {
  const std::uint64_t row = index / blocks_of_row(task);
  const std::uint64_t begin = (index - row * blocks_of_row(task)) * kLinkBlock;
  const std::uint64_t left = task.row_bytes - begin;
  const std::uint64_t size = left < kLinkBlock ? left : kLinkBlock;
  const std::uint64_t dst = task.dst + row * task.dst_pitch + begin;
  const std::uint64_t src = task.src + row * task.src_pitch + begin;
  std::uint64_t done = 0;
  if ((dst | src) % kVectorBytes == 0) {
    const std::uint64_t vectors = size / kVectorBytes;
    std::uint64_t first = worker;
    for (; first + (kLinkDepth - 1) * std::uint64_t{workers} < vectors; first += kLinkDepth * std::uint64_t{workers}) {
      Pack<kVectorBytes> packs[kLinkDepth];
      ODY_UNROLL
      for (int i = 0; i < kLinkDepth; ++i) {
        packs[i] = load<kVectorBytes>(src + (first + i * std::uint64_t{workers}) * kVectorBytes);
      }
      ODY_UNROLL
      for (int i = 0; i < kLinkDepth; ++i) {
        store<kVectorBytes>(dst + (first + i * std::uint64_t{workers}) * kVectorBytes, packs[i]);
      }
    }
    for (; first < vectors; first += workers) {
      store<kVectorBytes>(dst + first * kVectorBytes, load<kVectorBytes>(src + first * kVectorBytes));
    }
    done = vectors * kVectorBytes;
  }
  for (std::uint64_t byte = done + worker; byte < size; byte += workers) copy_byte(dst + byte, src + byte);
}

// Blocks of threads that reach a link's rate: each moves about 40 GB/s, a rough figure of a Hopper multiprocessor's
// latency and 64 KiB in flight, not measured here; more than 16 would take too much of the device from the product.
constexpr double kLinkBytesPerBlock = 40e9;
constexpr int kMostLinkBlocks = 16;

inline int link_grid(double bytes_per_s, std::uint64_t blocks) {
  const double wanted = bytes_per_s / kLinkBytesPerBlock;
  int grid = wanted >= kMostLinkBlocks ? kMostLinkBlocks : static_cast<int>(wanted);
  if (grid < wanted && grid < kMostLinkBlocks) ++grid;
  if (static_cast<std::uint64_t>(grid) > blocks) grid = static_cast<int>(blocks);
  return grid < 1 ? 1 : grid;
}

}  // namespace odysseus
