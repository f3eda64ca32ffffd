#include "program.h"

#include <algorithm>
#include <cmath>

#include "copy.h"
#include "runtime.h"

namespace odysseus {

void EventDeleter::operator()(cudaEvent_t event) const noexcept {
  try {
    const DeviceGuard guard(device);
    const RelaxedCapture relaxed;
    if (cudaEventDestroy(event) != cudaSuccess) cudaGetLastError();
  } catch (const std::exception&) {
    // The context is gone, and the event with it.
  }
}

void MemoryDeleter::operator()(void* memory) const noexcept {
  try {
    const DeviceGuard guard(device);
    const RelaxedCapture relaxed;
    if (cudaFree(memory) != cudaSuccess) cudaGetLastError();
  } catch (const std::exception&) {
    // The context is gone, and the memory with it.
  }
}

namespace {

// On a stream of its own: the device as a whole need never become idle while waits of another program spin.
void zero(void* memory, std::size_t bytes) {
  cudaStream_t stream = nullptr;
  ODY_CUDA(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "making a stream");
  cudaError_t error = cudaMemsetAsync(memory, 0, bytes, stream);
  if (error == cudaSuccess) error = cudaStreamSynchronize(stream);
  const cudaError_t destroyed = cudaStreamDestroy(stream);
  ODY_CUDA(error, "zeroing ", bytes, " bytes");
  ODY_CUDA(destroyed, "destroying a stream");
}

}  // namespace

Program::Program(std::shared_ptr<Control> control, int device, double link)
    : control_(std::move(control)), device_(device), link_(link) {
  ODY_CHECK_VALUE(device, ==, control_->device(), "the program and its control belong to one device");
  ODY_CHECK_VALUE(link, >=, 0.0, "bytes per second, 0 for no emulated link");
  ODY_CHECK_VALUE(std::isfinite(link), ==, true, "bytes per second, 0 for no emulated link");
  check_device(device);
  load_kernels(device);
  multiprocessors_ = multiprocessors(device);
  if (link > 0) {
    // Now and not when needed: memory cannot be allocated while a stream is captured.
    const DeviceGuard guard(device);
    const RelaxedCapture relaxed;
    const std::size_t bytes = (1 + kMaxStreams) * sizeof(std::uint64_t);
    void* memory = nullptr;
    ODY_CUDA(cudaMalloc(&memory, bytes), "allocating the clock of an emulated link on device ", device);
    clocks_ = UniqueMemory(memory, MemoryDeleter{device});
    zero(memory, bytes);
  }
}

cudaEvent_t Program::event(int index) {
  const auto place = static_cast<std::size_t>(index);
  while (events_.size() <= place) events_.emplace_back(nullptr, EventDeleter{device_});
  if (events_[place] == nullptr) {
    cudaEvent_t event = nullptr;
    ODY_CUDA(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "making event ", index);
    events_[place].reset(event);
  }
  return events_[place].get();
}

void Program::close() {
  const std::lock_guard<std::mutex> lock(mutex_);
  closed_ = true;
  events_.clear();
  clocks_.reset();
}

// Enqueues operations of one run.
class ProgramPass : public Pass {
 public:
  ProgramPass(Program& program, const std::vector<std::uint64_t>& streams, const std::vector<std::uint64_t>& bases,
              double timeout_s)
      : program_(program),
        control_(program.control_->device_block()),
        batches_(streams.size(), kUnknown),
        enqueuer_(*this, streams, bases, timeout_s) {}

  void enqueue(std::int64_t first, std::int64_t last) override {
    const std::lock_guard<std::mutex> lock(program_.mutex_);
    ODY_CHECK_STATE(program_.closed_, ==, false, "the Program is closed");
    const DeviceGuard guard(program_.device_);
    enqueuer_.enqueue(program_.operations(), first, last);
  }

  void set_stream(int index, std::uint64_t handle) {
    stream_index_ = index;
    stream_ = reinterpret_cast<cudaStream_t>(handle);
  }

  void copy(std::uint64_t dst, std::uint64_t src, const CopyShape& whole, bool over_link) {
    if (!over_link || program_.link_ == 0) {
      // Within the device its multiprocessors copy fastest, and everybody waits for these copies.
      copy_async(dst, src, whole, stream_, over_link && batches());
      return;
    }
    auto* const clocks = static_cast<std::uint64_t*>(program_.clocks_.get());
    std::uint64_t* const over_at = clocks + 1 + stream_index_;
    bool any = false;
    for (const CopyPart& part : link_pieces(whole)) {
      const double seconds = static_cast<double>(part.row_bytes * part.rows) / program_.link_;
      ODY_CUDA(launch_book(LinkTask{clocks, over_at, nanoseconds(seconds)}, stream_), "booking the emulated link");
      const CopyShape shape = simplify({part.row_bytes, part.rows, whole.dst_pitch, whole.src_pitch});
      copy_async(dst + part.dst_offset, src + part.src_offset, shape, stream_, batches());
      any = true;
    }
    if (any) ODY_CUDA(launch_release(over_at, stream_), "waiting for the emulated link");
  }

  void wait(WaitTask task) {
    complete(task);
    ODY_CUDA(launch_wait(task, stream_), "waiting for words (tag ", task.tag, ")");
  }

  void signal(SignalTask task) {
    task.aborted = program_.control_->aborted();
    ODY_CUDA(launch_signal(task, stream_), "signalling");
  }

  void advance(std::uint32_t* epoch) { ODY_CUDA(launch_advance(epoch, stream_), "advancing an epoch"); }

  void reduce(const ReduceOperation& operation, const ReduceTask& task, WaitTask wait) {
    if (operation.wait) complete(wait);
    const Share share = operation.wait         ? Share::kWaiting
                        : operation.beside > 0 ? Share::kBeside
                                               : Share::kDevice;
    const Grid grid = reduce_grid(accesses(task), share, program_.multiprocessors_, operation.beside);
    ODY_CUDA(launch_reduce(task, wait, operation.source_dtype, operation.out_dtype, grid, stream_), "adding ",
             task.sources, " sources of ", operation.rows, " rows of ", operation.count, " elements");
  }

  void multicast(const MulticastOperation& operation, const MultimemTask& task) {
    const Share share = operation.beside > 0 ? Share::kBeside : Share::kDevice;
    const Grid grid = reduce_grid(task.vectors, share, program_.multiprocessors_, operation.beside);
    if (operation.adds) {
      ODY_CUDA(launch_multimem_reduce(task, operation.dtype, grid, stream_), "adding ", operation.rows, " rows of ",
               operation.row_bytes, " bytes by multicast");
    } else {
      ODY_CUDA(launch_multimem_store(task, grid, stream_), "storing ", operation.rows, " rows of ",
               operation.row_bytes, " bytes by multicast");
    }
  }

  void record(int event) { ODY_CUDA(cudaEventRecord(program_.event(event), stream_), "recording event ", event); }

  void depend(int event) {
    ODY_CUDA(cudaStreamWaitEvent(stream_, program_.event(event), 0), "depending on event ", event);
  }

 private:
  // What ends a wait that cannot succeed.
  void complete(WaitTask& task) const {
    task.aborted = program_.control_->aborted();
    task.control = control_;
  }

  // Asked once for each stream, and not at all for streams that copy nothing.
  bool batches() {
    signed char& known = batches_[static_cast<std::size_t>(stream_index_)];
    if (known == kUnknown) known = takes_batches(stream_) ? 1 : 0;
    return known == 1;
  }

  static constexpr signed char kUnknown = -1;

  Program& program_;
  ControlBlock* const control_;
  std::vector<signed char> batches_;
  Enqueuer<ProgramPass> enqueuer_;
  int stream_index_ = 0;
  cudaStream_t stream_ = nullptr;
};

std::unique_ptr<Pass> Program::begin(std::int64_t first, std::int64_t last, const std::vector<std::uint64_t>& streams,
                                     const std::vector<std::uint64_t>& bases, double timeout_s) {
  const std::lock_guard<std::mutex> lock(mutex_);
  ODY_CHECK_STATE(closed_, ==, false, "the Program is closed");
  check_run_locked(first, last, streams.size(), bases, timeout_s);
  return std::make_unique<ProgramPass>(*this, streams, bases, timeout_s);
}

void Program::run(std::int64_t first, std::int64_t last, const std::vector<std::uint64_t>& streams,
                  const std::vector<std::uint64_t>& bases, double timeout_s) {
  begin(first, last, streams, bases, timeout_s)->enqueue(first, last);
}

}  // namespace odysseus
