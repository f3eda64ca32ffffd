// Launching a kernel whose only parameter is a task.
#pragma once

#include <cuda_runtime.h>

namespace odysseus {

// Arguments after the kernel are its parameters; the error is returned and not left behind for a later call to find.
template <class... Tasks>
cudaError_t launch(void (*kernel)(Tasks...), int blocks, int threads, cudaStream_t stream, Tasks... tasks) {
  void* arguments[] = {static_cast<void*>(&tasks)...};
  const cudaError_t error =
      cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(static_cast<unsigned>(blocks)),
                       dim3(static_cast<unsigned>(threads)), arguments, 0, stream);
  if (error != cudaSuccess) cudaGetLastError();
  return error;
}

}  // namespace odysseus
