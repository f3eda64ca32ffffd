#include "control.h"

#include <chrono>
#include <cstring>
#include <limits>
#include <thread>

#include "runtime.h"

namespace odysseus {
namespace {

// The device writes these words: every read goes to memory.
std::uint32_t read_word(const std::uint32_t& word) { return __atomic_load_n(&word, __ATOMIC_ACQUIRE); }

}  // namespace

Control::Control(int device, std::uint64_t aborted)
    : device_(device), aborted_(reinterpret_cast<std::uint32_t*>(aborted)) {
  ODY_CHECK_VALUE(aborted, !=, std::uint64_t{0}, "aborted is a null pointer");
  ODY_CHECK_VALUE(aborted % sizeof(std::uint32_t), ==, std::uint64_t{0}, "aborted is the address of a uint32");
  check_device(device);
  const DeviceGuard guard(device);
  const RelaxedCapture relaxed;
  void* block = nullptr;
  ODY_CUDA(cudaHostAlloc(&block, sizeof(ControlBlock), cudaHostAllocMapped | cudaHostAllocPortable),
           "allocating the control block of device ", device);
  std::memset(block, 0, sizeof(ControlBlock));
  host_ = static_cast<ControlBlock*>(block);
  void* mapped = nullptr;
  const cudaError_t error = cudaHostGetDevicePointer(&mapped, block, 0);
  if (error != cudaSuccess) {
    release();
    throw_cuda("cudaHostGetDevicePointer", error, concat("mapping the control block on device ", device));
  }
  mapped_ = static_cast<ControlBlock*>(mapped);
}

void Control::abort(std::int64_t code) {
  ODY_CHECK_VALUE(code, >=, static_cast<std::int64_t>(kSmallestAbort), "smaller codes are taken");
  ODY_CHECK_VALUE(code, <=, std::int64_t{std::numeric_limits<std::int32_t>::max()}, "codes have 31 bits");
  const std::lock_guard<std::mutex> lock(mutex_);
  if (host_ == nullptr || host_->abort != 0) return;
  __atomic_store_n(&host_->abort, static_cast<std::uint32_t>(code), __ATOMIC_RELEASE);
}

std::optional<WaitError> Control::error() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return host_ != nullptr ? read() : last_;
}

std::optional<WaitError> Control::read() const {
  if (read_word(host_->claimed) == 0) return std::nullopt;
  // A stream that another wait's giving up has ended may be done before that wait has written down why: it takes
  // microseconds, unless the device died meanwhile.
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::milliseconds(100);
  while (read_word(host_->recorded) == 0) {
    if (std::chrono::steady_clock::now() > deadline) return std::nullopt;
    std::this_thread::yield();
  }
  return WaitError{read_word(host_->code), read_word(host_->tag), read_word(host_->index), read_word(host_->expected),
                   read_word(host_->seen)};
}

void Control::close() noexcept {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (host_ == nullptr) return;
  last_ = read();
  release();
}

void Control::release() noexcept {
  if (host_ == nullptr) return;
  ControlBlock* const block = host_;
  host_ = mapped_ = nullptr;
  try {
    const DeviceGuard guard(device_);
    const RelaxedCapture relaxed;
    if (cudaFreeHost(block) != cudaSuccess) cudaGetLastError();
  } catch (const std::exception&) {
    // The context is gone, and the memory with it.
  }
}

ControlBlock* Control::device_block() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (mapped_ == nullptr) throw std::runtime_error("the Control of this Program is closed");
  return mapped_;
}

}  // namespace odysseus
