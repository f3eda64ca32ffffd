#include "rehearsal.h"

namespace odysseus {

class RehearsalPass : public Pass {
 public:
  RehearsalPass(Rehearsal& rehearsal, const std::vector<std::uint64_t>& streams,
                const std::vector<std::uint64_t>& bases, double timeout_s)
      : rehearsal_(rehearsal), enqueuer_(*this, streams, bases, timeout_s) {}

  void enqueue(std::int64_t first, std::int64_t last) override {
    const std::lock_guard<std::mutex> lock(rehearsal_.mutex_);
    enqueuer_.enqueue(rehearsal_.operations(), first, last);
  }

  void set_stream(int, std::uint64_t handle) { stream_ = handle; }

  void copy(std::uint64_t dst, std::uint64_t src, const CopyShape& shape, bool over_link) {
    if (!counts()) return;
    list("copy", {dst, src},
         {signed_of(shape.row_bytes), signed_of(shape.rows), signed_of(shape.dst_pitch), signed_of(shape.src_pitch),
          over_link ? 1 : 0});
  }

  void wait(const WaitTask& task) {
    if (counts()) list_words("wait", task, {task.tag});
  }

  void signal(const SignalTask& task) {
    if (counts()) list_words("signal", task, {});
  }

  void advance(const std::uint32_t* epoch) {
    if (counts()) list("advance", {address_of(epoch)}, {});
  }

  void reduce(const ReduceOperation& operation, const ReduceTask& task, const WaitTask&) {
    if (!counts()) return;
    std::vector<std::uint64_t> addresses{task.out};
    addresses.insert(addresses.end(), task.source, task.source + task.sources);
    list("reduce", std::move(addresses), {signed_of(operation.count), operation.rows, operation.beside});
  }

  void multicast(const MulticastOperation& operation, const MultimemTask& task) {
    if (!counts()) return;
    list(operation.adds ? "reduce_multicast" : "store_multicast", {task.local, task.multicast},
         {signed_of(operation.row_bytes), operation.rows, signed_of(operation.pitch), operation.beside});
  }

  void record(int event) {
    if (counts()) list("record", {}, {event});
  }

  void depend(int event) {
    if (counts()) list("depend", {}, {event});
  }

 private:
  static std::int64_t signed_of(std::uint64_t value) { return static_cast<std::int64_t>(value); }
  static std::uint64_t address_of(const std::uint32_t* word) { return reinterpret_cast<std::uintptr_t>(word); }

  // Counts a launch; whether it is to be listed, too.
  bool counts() {
    ++rehearsal_.launched_;
    return rehearsal_.lists_;
  }

  void list(const char* kind, std::vector<std::uint64_t> addresses, std::vector<std::int64_t> values) {
    rehearsal_.launches_.push_back({kind, stream_, std::move(addresses), std::move(values)});
  }

  template <class Task>
  void list_words(const char* kind, const Task& task, const std::vector<std::int64_t>& more) {
    std::vector<std::uint64_t> addresses{address_of(task.epoch)};
    std::vector<std::int64_t> values;
    for (int i = 0; i < task.count; ++i) {
      addresses.push_back(address_of(task.words[i]));
      values.push_back(task.values[i]);
    }
    values.insert(values.end(), more.begin(), more.end());
    list(kind, std::move(addresses), std::move(values));
  }

  Rehearsal& rehearsal_;
  Enqueuer<RehearsalPass> enqueuer_;
  std::uint64_t stream_ = 0;
};

std::unique_ptr<Pass> Rehearsal::begin(std::int64_t first, std::int64_t last, const std::vector<std::uint64_t>& streams,
                                       const std::vector<std::uint64_t>& bases, double timeout_s) {
  check_run(first, last, streams.size(), bases, timeout_s);
  return std::make_unique<RehearsalPass>(*this, streams, bases, timeout_s);
}

void Rehearsal::run(std::int64_t first, std::int64_t last, const std::vector<std::uint64_t>& streams,
                    const std::vector<std::uint64_t>& bases, double timeout_s) {
  begin(first, last, streams, bases, timeout_s)->enqueue(first, last);
}

std::int64_t Rehearsal::launched() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return launched_;
}

std::vector<Launch> Rehearsal::take_launches() {
  const std::lock_guard<std::mutex> lock(mutex_);
  std::vector<Launch> taken;
  taken.swap(launches_);
  return taken;
}

}  // namespace odysseus
