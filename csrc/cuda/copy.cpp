// A plain asynchronous copy between two buffers of one device runs as a kernel.  The driver's batch copies can be told
// to prefer an engine; where they are missing or refuse, plain copies do the same, only not beside products.
#include "copy.h"

#include <cudaTypedefs.h>

#include <mutex>
#include <vector>

#include "runtime.h"

namespace odysseus {
namespace {

// Copies of more rows go out as one 2-D copy: each row of a batch costs the engine a command of its own.
constexpr std::size_t kMostRowsInBatch = 256;

void* pointer(std::uint64_t address) { return reinterpret_cast<void*>(address); }

void copy_plainly(std::uint64_t dst, std::uint64_t src, const CopyShape& shape, cudaStream_t stream) {
  if (shape.rows == 1) {
    ODY_CUDA(cudaMemcpyAsync(pointer(dst), pointer(src), shape.row_bytes, cudaMemcpyDefault, stream), "copying ",
             shape.row_bytes, " bytes from ", src, " to ", dst);
  } else {
    ODY_CUDA(cudaMemcpy2DAsync(pointer(dst), shape.dst_pitch, pointer(src), shape.src_pitch, shape.row_bytes,
                               shape.rows, cudaMemcpyDefault, stream),
             "copying ", shape.rows, " rows of ", shape.row_bytes, " bytes from ", src, " (pitch ", shape.src_pitch,
             ") to ", dst, " (pitch ", shape.dst_pitch, ")");
  }
}

// Whether batch copies work here is found out by using them.
class BatchCopies {
 public:
  static BatchCopies& instance() {
    static BatchCopies copies;
    return copies;
  }

  bool usable() const { return (current_ != nullptr || former_ != nullptr) && why_not().empty(); }

  std::string why_not() const {
    if (current_ == nullptr && former_ == nullptr) return "the CUDA driver has no cuMemcpyBatchAsync (12.8 or later)";
    const std::lock_guard<std::mutex> lock(mutex_);
    return refused_;
  }

  void refuse(CUresult result) {
    const std::lock_guard<std::mutex> lock(mutex_);
    refused_ = concat("cuMemcpyBatchAsync returned CUresult ", static_cast<int>(result));
  }

  CUresult copy(std::uint64_t dst, std::uint64_t src, const CopyShape& shape, cudaStream_t stream) const {
    std::vector<CUdeviceptr> targets(shape.rows);
    std::vector<CUdeviceptr> sources(shape.rows);
    std::vector<std::size_t> sizes(shape.rows, shape.row_bytes);
    for (std::size_t row = 0; row < shape.rows; ++row) {
      targets[row] = dst + row * shape.dst_pitch;
      sources[row] = src + row * shape.src_pitch;
    }
    CUmemcpyAttributes attributes{};
    attributes.srcAccessOrder = CU_MEMCPY_SRC_ACCESS_ORDER_STREAM;
    attributes.flags = CU_MEMCPY_FLAG_PREFER_OVERLAP_WITH_COMPUTE;
    std::size_t first_with_attributes = 0;
    if (current_ != nullptr) {
      return current_(targets.data(), sources.data(), sizes.data(), shape.rows, &attributes, &first_with_attributes, 1,
                      stream);
    }
    std::size_t failed = 0;
    return former_(targets.data(), sources.data(), sizes.data(), shape.rows, &attributes, &first_with_attributes, 1,
                   &failed, stream);
  }

 private:
  // The arguments changed with 13.0: the version that is asked for decides which function comes back.
  BatchCopies()
      : current_(reinterpret_cast<PFN_cuMemcpyBatchAsync_v13000>(driver_function("cuMemcpyBatchAsync", 13000))) {
    int version = 0;
    if (cudaDriverGetVersion(&version) != cudaSuccess) version = 0;
    // A driver before 13.0 answers the question for 13.0 with its own, older function.
    if (version < 13000) {
      current_ = nullptr;
      former_ = reinterpret_cast<PFN_cuMemcpyBatchAsync_v12080>(driver_function("cuMemcpyBatchAsync", 12080));
    }
  }

  PFN_cuMemcpyBatchAsync_v13000 current_ = nullptr;
  PFN_cuMemcpyBatchAsync_v12080 former_ = nullptr;
  mutable std::mutex mutex_;
  std::string refused_;
};

}  // namespace

void copy_async(std::uint64_t dst, std::uint64_t src, const CopyShape& shape, cudaStream_t stream, bool batches) {
  if (shape.row_bytes == 0 || shape.rows == 0) return;
  BatchCopies& batch = BatchCopies::instance();
  if (!batches || shape.rows > kMostRowsInBatch || !batch.usable()) {
    copy_plainly(dst, src, shape, stream);
    return;
  }
  const CUresult result = batch.copy(dst, src, shape, stream);
  if (result == CUDA_SUCCESS) return;
  copy_plainly(dst, src, shape, stream);  // throws where it is the arguments that are wrong
  batch.refuse(result);
}

bool takes_batches(cudaStream_t stream) {
  // The two handles of the default streams are no addresses; batch calls refuse the legacy one.
  if (stream == nullptr || stream == cudaStreamLegacy) return false;
  if (!BatchCopies::instance().usable()) return false;
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  ODY_CUDA(cudaStreamIsCapturing(stream, &status), "asking whether stream ", stream, " is being captured");
  return status == cudaStreamCaptureStatusNone;
}

std::string why_no_batch_copies() { return BatchCopies::instance().why_not(); }

}  // namespace odysseus
