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

// Enqueues operations, of one call of run().
class Enqueuer {
 public:
  Enqueuer(Program& program, const std::vector<std::uint64_t>& streams, const std::vector<std::uint64_t>& bases,
           double timeout_s)
      : program_(program),
        streams_(streams),
        bases_(bases),
        timeout_ns_(nanoseconds(timeout_s)),
        control_(program.control_->device_block()),
        batches_(streams.size(), kUnknown) {}

  void enqueue(const Operation& operation) {
    stream_index_ = operation.stream;
    stream_ = reinterpret_cast<cudaStream_t>(streams_[static_cast<std::size_t>(stream_index_)]);
    std::visit([this](const auto& what) { (*this)(what); }, operation.what);
  }

  void operator()(const CopyOperation& operation) {
    const std::uint64_t dst = at(operation.dst);
    const std::uint64_t src = at(operation.src);
    if (!operation.over_link || program_.link_ == 0) {
      // Within the device its multiprocessors copy fastest, and everybody waits for these copies.
      copy_async(dst, src, operation.shape, stream_, operation.over_link && batches());
      return;
    }
    auto* const clocks = static_cast<std::uint64_t*>(program_.clocks_.get());
    std::uint64_t* const over_at = clocks + 1 + stream_index_;
    bool any = false;
    for (const CopyPart& part : link_pieces(operation.shape)) {
      const double seconds = static_cast<double>(part.row_bytes * part.rows) / program_.link_;
      ODY_CUDA(launch_book(LinkTask{clocks, over_at, nanoseconds(seconds)}, stream_), "booking the emulated link");
      const CopyShape shape =
          simplify({part.row_bytes, part.rows, operation.shape.dst_pitch, operation.shape.src_pitch});
      copy_async(dst + part.dst_offset, src + part.src_offset, shape, stream_, batches());
      any = true;
    }
    if (any) ODY_CUDA(launch_release(over_at, stream_), "waiting for the emulated link");
  }

  void operator()(const WaitOperation& operation) {
    for (std::size_t first = 0; first < operation.words.words.size(); first += kWordsAtOnce) {
      ODY_CUDA(launch_wait(wait_task(operation, first), stream_), "waiting for words (tag ", operation.tag, ")");
    }
  }

  void operator()(const SignalOperation& operation) {
    const Words& words = operation.words;
    for (std::size_t first = 0; first < words.words.size(); first += kWordsAtOnce) {
      SignalTask task{};
      task.epoch = word(words.epoch);
      task.count = fill(words, first, task.words, task.values);
      task.aborted = program_.control_->aborted();
      ODY_CUDA(launch_signal(task, stream_), "signalling");
    }
  }

  void operator()(const AdvanceOperation& operation) {
    ODY_CUDA(launch_advance(word(operation.epoch), stream_), "advancing an epoch");
  }

  void operator()(const ReduceOperation& operation) {
    // Without elements there is still something to wait for.
    if ((operation.count == 0 || operation.rows == 0) && !operation.wait) return;
    const ReduceTask task = reduce_task(operation, bases_);
    WaitTask wait{};
    if (operation.wait) wait = wait_task(*operation.wait, 0);
    const Grid grid =
        reduce_grid(accesses(task), operation.wait ? Share::kWaiting : Share::kQuarter, program_.multiprocessors_, 0);
    ODY_CUDA(launch_reduce(task, wait, operation.source_dtype, operation.out_dtype, grid, stream_), "adding ",
             task.sources, " sources of ", operation.rows, " rows of ", operation.count, " elements");
  }

  void operator()(const RecordOperation& operation) {
    ODY_CUDA(cudaEventRecord(program_.event(operation.event), stream_), "recording event ", operation.event);
  }

  void operator()(const DependOperation& operation) {
    ODY_CUDA(cudaStreamWaitEvent(stream_, program_.event(operation.event), 0), "depending on event ", operation.event);
  }

 private:
  std::uint64_t at(const Address& address) const { return resolve(address, bases_); }
  std::uint32_t* word(const Address& address) const { return reinterpret_cast<std::uint32_t*>(at(address)); }

  // Words from `first` on, as many as one launch takes.
  template <class Pointer>
  int fill(const Words& words, std::size_t first, Pointer* pointers, std::int32_t* values) const {
    const std::size_t count = std::min<std::size_t>(words.words.size() - first, kWordsAtOnce);
    for (std::size_t i = 0; i < count; ++i) {
      pointers[i] = word(words.words[first + i]);
      values[i] = words.values[first + i];
    }
    return static_cast<int>(count);
  }

  WaitTask wait_task(const WaitOperation& operation, std::size_t first) const {
    WaitTask task{};
    task.epoch = word(operation.words.epoch);
    task.count = fill(operation.words, first, task.words, task.values);
    task.first_index = static_cast<std::uint32_t>(first);
    task.tag = operation.tag;
    task.aborted = program_.control_->aborted();
    task.control = control_;
    task.timeout_ns = timeout_ns_;
    return task;
  }

  // Asked once for each stream, and not at all for streams that copy nothing.
  bool batches() {
    signed char& known = batches_[static_cast<std::size_t>(stream_index_)];
    if (known == kUnknown) known = takes_batches(stream_) ? 1 : 0;
    return known == 1;
  }

  static constexpr signed char kUnknown = -1;

  Program& program_;
  const std::vector<std::uint64_t>& streams_;
  const std::vector<std::uint64_t>& bases_;
  const std::uint64_t timeout_ns_;
  ControlBlock* const control_;
  std::vector<signed char> batches_;
  int stream_index_ = 0;
  cudaStream_t stream_ = nullptr;
};

void Program::run(std::int64_t first, std::int64_t last, const std::vector<std::uint64_t>& streams,
                  const std::vector<std::uint64_t>& bases, double timeout_s) {
  const std::lock_guard<std::mutex> lock(mutex_);
  ODY_CHECK_STATE(closed_, ==, false, "the Program is closed");
  check_run_locked(first, last, streams.size(), bases, timeout_s);
  const DeviceGuard guard(device_);
  Enqueuer enqueuer(*this, streams, bases, timeout_s);
  for (std::int64_t i = first; i < last; ++i) {
    try {
      enqueuer.enqueue(operations()[static_cast<std::size_t>(i)]);
    } catch (const std::runtime_error& error) {
      throw std::runtime_error(concat("operation ", i, ": ", error.what()));
    }
  }
}

}  // namespace odysseus
