// The CUDA runtime and driver: errors, the current device, and what is loaded on first use.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <string>
#include <utility>
#include <vector>

#include "../common/check.h"

namespace odysseus {

[[noreturn]] void throw_cuda(const char* call, cudaError_t error, const std::string& what);
[[noreturn]] void throw_driver(const char* call, CUresult result, const std::string& what);

// A function of libcuda, which is never linked: with_version() resolves it on first use, and gives null where the
// driver is missing or too old.
void* driver_function(const char* name, int version);

// "" where a driver and a device for these kernels are there, else one line.
std::string why_no_cuda();

// Throws std::runtime_error with why_no_cuda() unless that is empty, std::invalid_argument for an unknown device.
void check_device(int device);

int multiprocessors(int device);
bool multicasts(int device);

// Makes all kernels of the module resident.  The runtime loads a kernel at its first launch, and may wait for the
// device to be idle, which it never becomes while a wait spins for a signal that is still to be launched.
void load_kernels(int device);

// Of each kernel that orders streams and ranks, on a device: registers of a thread, and the share of a multiprocessor's
// memory, in per cent, that it asks to be shared memory.
std::vector<std::pair<int, int>> small_kernels(int device);

// The device to which an address belongs; std::invalid_argument where it is not CUDA's.
int device_of(std::uintptr_t address, const char* name);

// Makes a device current, and what was current before again.  It goes by contexts, since naming the former device
// would create a context there for a thread that had none.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device);
  ~DeviceGuard();
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  CUcontext before_ = nullptr;
};

// While one lives, calls are allowed that the capture of some stream forbids because they may synchronize, such as
// allocating memory; they concern no captured stream here, and a garbage collector may run them at any time.
class RelaxedCapture {
 public:
  RelaxedCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  ~RelaxedCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  RelaxedCapture(const RelaxedCapture&) = delete;
  RelaxedCapture& operator=(const RelaxedCapture&) = delete;

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

}  // namespace odysseus

// ODY_CUDA(cudaCall(...), "what was being done", ...): throws std::runtime_error naming the call, the error and that.
#define ODY_CUDA(call, ...)                                                                                  \
  do {                                                                                                       \
    const cudaError_t ody_error = (call);                                                                    \
    if (ody_error != cudaSuccess) ::odysseus::throw_cuda(#call, ody_error, ::odysseus::concat(__VA_ARGS__)); \
  } while (0)
