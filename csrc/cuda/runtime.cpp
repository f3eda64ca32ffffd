#include "runtime.h"

#include <cudaTypedefs.h>

#include <mutex>
#include <set>

#include "tasks.h"

namespace odysseus {
namespace {

constexpr int kOldestMajor = 8;

// Up to the arguments, which the text of a call in ODY_CUDA includes.
std::string name_of_call(const char* call) {
  const std::string text = call;
  return text.substr(0, text.find('('));
}

template <class Function>
Function driver(const char* name, int version) {
  return reinterpret_cast<Function>(driver_function(name, version));
}

PFN_cuCtxGetCurrent_v4000 get_context() {
  static const auto function = driver<PFN_cuCtxGetCurrent_v4000>("cuCtxGetCurrent", 4000);
  return function;
}

PFN_cuCtxSetCurrent_v4000 set_context() {
  static const auto function = driver<PFN_cuCtxSetCurrent_v4000>("cuCtxSetCurrent", 4000);
  return function;
}

int attribute(cudaDeviceAttr which, int device, const char* what) {
  int value = 0;
  ODY_CUDA(cudaDeviceGetAttribute(&value, which, device), what, " of device ", device);
  return value;
}

std::string describe(cudaError_t error) {
  return concat(cudaGetErrorName(error), " (", cudaGetErrorString(error), ")");
}

}  // namespace

void throw_cuda(const char* call, cudaError_t error, const std::string& what) {
  cudaGetLastError();  // so that no later call reports it again
  throw std::runtime_error(concat(name_of_call(call), " failed with ", describe(error), ": ", what));
}

void throw_driver(const char* call, CUresult result, const std::string& what) {
  const char* name = nullptr;
  if (const auto get = driver<PFN_cuGetErrorName_v6000>("cuGetErrorName", 6000)) get(result, &name);
  throw std::runtime_error(
      concat(call, " failed with ", name != nullptr ? name : "CUresult", " (", static_cast<int>(result), "): ", what));
}

void* driver_function(const char* name, int version) {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found{};
  const cudaError_t error =
      cudaGetDriverEntryPointByVersion(name, &function, static_cast<unsigned>(version), cudaEnableDefault, &found);
  if (error != cudaSuccess) {
    cudaGetLastError();
    return nullptr;
  }
  return found == cudaDriverEntryPointSuccess ? function : nullptr;
}

std::string why_no_cuda() {
  int devices = 0;
  const cudaError_t error = cudaGetDeviceCount(&devices);
  if (error != cudaSuccess) {
    cudaGetLastError();
    return concat("no CUDA driver or device can be used here: cudaGetDeviceCount says ", describe(error));
  }
  if (devices == 0) return "the CUDA driver finds no device";
  int newest = 0;
  for (int device = 0; device < devices; ++device) {
    int major = 0;
    if (cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess) cudaGetLastError();
    newest = major > newest ? major : newest;
  }
  if (newest >= kOldestMajor) return "";
  return concat("none of ", devices, " CUDA devices has compute capability ", kOldestMajor,
                ".0 or later; the newest has ", newest, ".x");
}

void check_device(int device) {
  const std::string reason = why_no_cuda();
  if (!reason.empty()) throw std::runtime_error(reason);
  int devices = 0;
  ODY_CUDA(cudaGetDeviceCount(&devices), "counting devices");
  ODY_CHECK_VALUE(device, >=, 0, "no such device");
  ODY_CHECK_VALUE(device, <, devices, "no such device");
  const int major = attribute(cudaDevAttrComputeCapabilityMajor, device, "the compute capability");
  ODY_CHECK_STATE(major, >=, kOldestMajor, "the compute capability of device ", device);
}

int multiprocessors(int device) {
  return attribute(cudaDevAttrMultiProcessorCount, device, "the number of multiprocessors");
}

bool multicasts(int device) {
  const auto get = driver<PFN_cuDeviceGet_v2000>("cuDeviceGet", 2000);
  const auto query = driver<PFN_cuDeviceGetAttribute_v2000>("cuDeviceGetAttribute", 2000);
  CUdevice handle = 0;
  int supported = 0;
  if (get == nullptr || query == nullptr || get(&handle, device) != CUDA_SUCCESS) return false;
  // Drivers before 12.1 do not know the question.
  return query(&supported, CU_DEVICE_ATTRIBUTE_MULTICAST_SUPPORTED, handle) == CUDA_SUCCESS && supported != 0;
}

void load_kernels(int device) {
  static std::mutex mutex;
  static std::set<int> loaded;
  const std::lock_guard<std::mutex> lock(mutex);
  if (loaded.count(device) != 0) return;
  const DeviceGuard guard(device);
  const RelaxedCapture relaxed;
  for (const auto& kernels : {signal_kernels(), reduce_kernels(), multimem_kernels()}) {
    for (const void* kernel : kernels) {
      cudaFuncAttributes attributes;
      ODY_CUDA(cudaFuncGetAttributes(&attributes, kernel), "loading the kernels on device ", device);
    }
  }
  // A launch may set how a multiprocessor divides its memory into cache and shared memory.  One of these small kernels
  // that came first to an idle multiprocessor would keep a product that wants all of it out until it ends.
  for (const void* kernel : signal_kernels()) {
    ODY_CUDA(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared),
             "setting the carve-out of the kernels on device ", device);
  }
  loaded.insert(device);
}

std::vector<std::pair<int, int>> small_kernels(int device) {
  check_device(device);
  load_kernels(device);
  const DeviceGuard guard(device);
  std::vector<std::pair<int, int>> found;
  for (const void* kernel : signal_kernels()) {
    cudaFuncAttributes attributes;
    ODY_CUDA(cudaFuncGetAttributes(&attributes, kernel), "asking for the kernels on device ", device);
    found.emplace_back(attributes.numRegs, attributes.preferredShmemCarveout);
  }
  return found;
}

int device_of(std::uintptr_t address, const char* name) {
  cudaPointerAttributes attributes{};
  const cudaError_t error = cudaPointerGetAttributes(&attributes, reinterpret_cast<const void*>(address));
  if (error != cudaSuccess) {
    const std::string reason = why_no_cuda();
    if (!reason.empty()) throw std::runtime_error(reason);
    throw_cuda("cudaPointerGetAttributes", error, concat(name, " at ", address));
  }
  if (attributes.type == cudaMemoryTypeUnregistered) {
    throw std::invalid_argument(concat(name, ": expected an address of CUDA memory, got ", address));
  }
  return attributes.device;
}

DeviceGuard::DeviceGuard(int device) {
  // Before the driver is initialized nothing is current.
  if (get_context() != nullptr && get_context()(&before_) != CUDA_SUCCESS) before_ = nullptr;
  ODY_CUDA(cudaSetDevice(device), "making device ", device, " current");
}

DeviceGuard::~DeviceGuard() {
  // An error means that the context is gone or the process ends: there is nothing left to restore.
  if (set_context() != nullptr) set_context()(before_);
}

}  // namespace odysseus
