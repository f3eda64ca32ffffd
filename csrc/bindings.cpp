// The extension module: registration only.
#include "host/register.h"
#ifdef ODYSSEUS_CUDA
#include "cuda/register.h"
#endif

PYBIND11_MODULE(_C, module) {
  module.doc() = "Compiled parts of odysseus_kernels; see odysseus_kernels/_C.pyi.";
  odysseus::register_errors(module);
  odysseus::register_reduce(module);
  odysseus::register_symmetric_host(module);
#ifdef ODYSSEUS_CUDA
  odysseus::register_cuda(module);
#endif
}
