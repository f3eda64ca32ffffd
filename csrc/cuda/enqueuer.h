// From recorded operations to launches, for whatever takes them: a device's streams, or a list.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>
#include <variant>
#include <vector>

#include "../common/check.h"
#include "recording.h"
#include "tasks.h"

namespace odysseus {

// One run of a recording: enqueues ranges of its operations, which must have passed their checks.
class Pass {
 public:
  virtual ~Pass() = default;
  virtual void enqueue(std::int64_t first, std::int64_t last) = 0;
};

// Resolves addresses and cuts operations into launches.  A Sink takes them: set_stream(index, handle), then copy,
// wait, signal, advance, reduce, multicast, record and depend.
template <class Sink>
class Enqueuer {
 public:
  Enqueuer(Sink& sink, const std::vector<std::uint64_t>& streams, const std::vector<std::uint64_t>& bases,
           double timeout_s)
      : sink_(sink), streams_(streams), bases_(bases), timeout_ns_(nanoseconds(timeout_s)) {}

  void enqueue(const Operation& operation) {
    sink_.set_stream(operation.stream, streams_[static_cast<std::size_t>(operation.stream)]);
    std::visit([this](const auto& what) { (*this)(what); }, operation.what);
  }

  // Operations [first, last); an error names the operation.
  void enqueue(const std::vector<Operation>& operations, std::int64_t first, std::int64_t last) {
    for (std::int64_t i = first; i < last; ++i) {
      try {
        enqueue(operations[static_cast<std::size_t>(i)]);
      } catch (const std::runtime_error& error) {
        throw std::runtime_error(concat("operation ", i, ": ", error.what()));
      }
    }
  }

  void operator()(const CopyOperation& operation) {
    sink_.copy(at(operation.dst), at(operation.src), operation.shape, operation.over_link);
  }

  void operator()(const WaitOperation& operation) {
    for (std::size_t first = 0; first < operation.words.words.size(); first += kWordsAtOnce) {
      sink_.wait(wait_task(operation, first));
    }
  }

  void operator()(const SignalOperation& operation) {
    const Words& words = operation.words;
    for (std::size_t first = 0; first < words.words.size(); first += kWordsAtOnce) {
      SignalTask task{};
      task.epoch = word(words.epoch);
      task.count = fill(words, first, task.words, task.values);
      sink_.signal(task);
    }
  }

  void operator()(const AdvanceOperation& operation) { sink_.advance(word(operation.epoch)); }

  void operator()(const ReduceOperation& operation) {
    // Without elements there is still something to wait for.
    if ((operation.count == 0 || operation.rows == 0) && !operation.wait) return;
    WaitTask wait{};
    if (operation.wait) wait = wait_task(*operation.wait, 0);
    sink_.reduce(operation, reduce_task(operation, bases_), wait);
  }

  void operator()(const MulticastOperation& operation) {
    if (operation.row_bytes == 0 || operation.rows == 0) return;
    sink_.multicast(operation, multimem_task(operation, bases_));
  }

  void operator()(const RecordOperation& operation) { sink_.record(operation.event); }
  void operator()(const DependOperation& operation) { sink_.depend(operation.event); }

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
    task.timeout_ns = timeout_ns_;
    return task;
  }

  Sink& sink_;
  const std::vector<std::uint64_t>& streams_;
  const std::vector<std::uint64_t>& bases_;
  const std::uint64_t timeout_ns_;
};

}  // namespace odysseus
