// Copies by the copy engines, so that no multiprocessor is taken from the products that run beside them.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <string>

#include "plan.h"

namespace odysseus {

// Enqueues a copy between any two addresses of devices or pinned host memory.  `batches` says whether the stream takes
// batch calls, which a stream under capture does not: see takes_batches().
void copy_async(std::uint64_t dst, std::uint64_t src, const CopyShape& shape, cudaStream_t stream, bool batches);

// Whether the driver's batch copies may be used on a stream now.
bool takes_batches(cudaStream_t stream);

// "" while batch copies are used or were not tried yet, else one line that says why they are not.
std::string why_no_batch_copies();

}  // namespace odysseus
