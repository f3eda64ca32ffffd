#include "recording.h"

#include <cmath>
#include <limits>

#include "../common/check.h"
#include "../host/reduce.h"

namespace odysseus {
namespace {

constexpr std::int64_t kNone = 0;
constexpr std::size_t kWord = sizeof(std::uint32_t);

// The message is made only where a check fails: recording is cheap, but not always rare.
void check_address(const Address& address, const char* name) {
  ODY_CHECK_VALUE(address.first, >=, kNone, name, ": index of a base");
  ODY_CHECK_VALUE(address.second, >=, kNone, name, ": bytes behind its base");
}

void check_size(std::int64_t size, const char* name) { ODY_CHECK_VALUE(size, >=, kNone, name); }

std::uint32_t checked_tag(std::int64_t tag) {
  ODY_CHECK_VALUE(tag, >=, kNone, "tag");
  ODY_CHECK_VALUE(tag, <=, std::int64_t{std::numeric_limits<std::uint32_t>::max()}, "a tag has 32 bits");
  return static_cast<std::uint32_t>(tag);
}

Words checked_words(const Address& epoch, const std::vector<Address>& words, const std::vector<std::int64_t>& values) {
  check_address(epoch, "epoch");
  ODY_CHECK_VALUE(words.size(), >=, std::size_t{1}, "there is nothing to wait for or to signal");
  ODY_CHECK_VALUE(words.size(), ==, values.size(), "each word has one value");
  Words result{epoch, words, {}};
  for (std::size_t i = 0; i < words.size(); ++i) {
    check_address(words[i], "word");
    ODY_CHECK_VALUE(values[i], >=, std::int64_t{kSmallestValue}, "value ", i);
    ODY_CHECK_VALUE(values[i], <=, std::int64_t{kLargestValue}, "value ", i);
    result.values.push_back(static_cast<std::int32_t>(values[i]));
  }
  return result;
}

int checked_multiprocessors(std::int64_t beside) {
  check_size(beside, "beside");
  ODY_CHECK_VALUE(beside, <=, std::int64_t{std::numeric_limits<int>::max()}, "beside: a number of multiprocessors");
  return static_cast<int>(beside);
}

// A pitch in bytes; 0 stands for dense rows.
std::uint64_t checked_pitch(std::int64_t pitch, std::uint64_t row_bytes, std::int64_t rows, const char* name) {
  check_size(pitch, name);
  if (pitch == 0) return row_bytes;
  if (rows > 1) ODY_CHECK_VALUE(static_cast<std::uint64_t>(pitch), >=, row_bytes, name, ": rows overlap");
  return static_cast<std::uint64_t>(pitch);
}

// Calls visit(name, address, alignment) for every address of an operation.
template <class Visit>
void visit_addresses(const Words& words, const Visit& visit) {
  visit("epoch", words.epoch, kWord);
  for (const Address& word : words.words) visit("word", word, kWord);
}
template <class Visit>
void visit_addresses(const CopyOperation& operation, const Visit& visit) {
  visit("dst", operation.dst, 1);
  visit("src", operation.src, 1);
}
template <class Visit>
void visit_addresses(const WaitOperation& operation, const Visit& visit) {
  visit_addresses(operation.words, visit);
}
template <class Visit>
void visit_addresses(const SignalOperation& operation, const Visit& visit) {
  visit_addresses(operation.words, visit);
}
template <class Visit>
void visit_addresses(const AdvanceOperation& operation, const Visit& visit) {
  visit("epoch", operation.epoch, kWord);
}
template <class Visit>
void visit_addresses(const ReduceOperation& operation, const Visit& visit) {
  visit("out", operation.out, size_of(operation.out_dtype));
  for (const Address& source : operation.sources) visit("source", source, size_of(operation.source_dtype));
  if (operation.wait) visit_addresses(operation.wait->words, visit);
}
template <class Visit>
void visit_addresses(const MulticastOperation& operation, const Visit& visit) {
  visit("local", operation.local, kVectorBytes);
  visit("multicast", operation.multicast, kVectorBytes);
}
template <class Visit>
void visit_addresses(const RecordOperation&, const Visit&) {}
template <class Visit>
void visit_addresses(const DependOperation&, const Visit&) {}

}  // namespace

template <class What>
void Recording::add(std::int64_t stream, What what) {
  ODY_CHECK_VALUE(stream, >=, kNone, "stream");
  ODY_CHECK_VALUE(stream, <, std::int64_t{kMaxStreams}, "stream");
  const std::lock_guard<std::mutex> lock(mutex_);
  operations_.push_back({static_cast<int>(stream), std::move(what)});
}

void Recording::copy(std::int64_t stream, Address dst, Address src, std::int64_t row_bytes, std::int64_t rows,
                     std::int64_t dst_pitch, std::int64_t src_pitch, bool over_link) {
  check_address(dst, "dst");
  check_address(src, "src");
  check_size(row_bytes, "row_bytes");
  check_size(rows, "rows");
  const auto bytes = static_cast<std::uint64_t>(row_bytes);
  const CopyShape shape{bytes, static_cast<std::size_t>(rows), checked_pitch(dst_pitch, bytes, rows, "dst_pitch"),
                        checked_pitch(src_pitch, bytes, rows, "src_pitch")};
  add(stream, CopyOperation{dst, src, simplify(shape), over_link});
}

void Recording::wait(std::int64_t stream, Address epoch, const std::vector<Address>& words,
                     const std::vector<std::int64_t>& values, std::int64_t tag) {
  add(stream, WaitOperation{checked_words(epoch, words, values), checked_tag(tag)});
}

void Recording::signal(std::int64_t stream, Address epoch, const std::vector<Address>& words,
                       const std::vector<std::int64_t>& values) {
  add(stream, SignalOperation{checked_words(epoch, words, values)});
}

void Recording::advance(std::int64_t stream, Address epoch) {
  check_address(epoch, "epoch");
  add(stream, AdvanceOperation{epoch});
}

void Recording::reduce(std::int64_t stream, Address out, const std::string& out_dtype,
                       const std::vector<Address>& sources, const std::string& source_dtype, std::int64_t count,
                       std::int64_t rows, std::int64_t out_pitch,
                       const std::optional<std::vector<std::int64_t>>& source_pitches, const ReduceWait& wait,
                       std::int64_t beside) {
  ReduceOperation operation{};
  operation.out = out;
  operation.out_dtype = parse_dtype(out_dtype);
  operation.source_dtype = parse_dtype(source_dtype);
  if (!with_types(operation.source_dtype, operation.out_dtype, [](auto, auto) {})) {
    throw std::invalid_argument(concat("expected equal dtypes, or float32 with bfloat16 or float16, got ",
                                       source_dtype, " sources and ", out_dtype, " out"));
  }
  check_address(out, "out");
  ODY_CHECK_VALUE(sources.size(), >=, std::size_t{1}, "a reduction needs a source");
  ODY_CHECK_VALUE(sources.size(), <=, std::size_t{kMaxSources}, "so many sources are added at once");
  for (const Address& source : sources) check_address(source, "source");
  operation.sources = sources;
  check_size(count, "count");
  check_size(rows, "rows");
  ODY_CHECK_VALUE(rows, <=, std::int64_t{std::numeric_limits<std::uint32_t>::max()}, "rows");
  operation.count = static_cast<std::uint64_t>(count);
  operation.rows = static_cast<std::uint32_t>(rows);
  const auto pitch = [&](std::int64_t bytes, DType dtype, const char* name) {
    const std::uint64_t result = checked_pitch(bytes, operation.count * size_of(dtype), rows, name);
    ODY_CHECK_VALUE(result % size_of(dtype), ==, std::uint64_t{0}, name, " ", bytes, ": whole elements");
    return result;
  };
  operation.out_pitch = pitch(out_pitch, operation.out_dtype, "out_pitch");
  if (source_pitches) ODY_CHECK_VALUE(source_pitches->size(), ==, sources.size(), "each source has one pitch");
  for (std::size_t i = 0; i < sources.size(); ++i) {
    const std::int64_t bytes = source_pitches ? (*source_pitches)[i] : 0;
    operation.source_pitches.push_back(pitch(bytes, operation.source_dtype, "source_pitches"));
  }
  if (wait.epoch.has_value() != wait.words.has_value() || wait.words.has_value() != wait.values.has_value()) {
    throw std::invalid_argument("epoch, words and values: expected all of them or none");
  }
  if (wait.epoch) {
    ODY_CHECK_VALUE(wait.words->size(), ==, sources.size(), "each source has one word");
    operation.wait = WaitOperation{checked_words(*wait.epoch, *wait.words, *wait.values), checked_tag(wait.tag)};
  }
  operation.beside = checked_multiprocessors(beside);
  add(stream, std::move(operation));
}

void Recording::reduce_multicast(std::int64_t stream, Address out, Address multicast, const std::string& dtype,
                                 std::int64_t count, std::int64_t rows, std::int64_t out_pitch, std::int64_t beside) {
  MulticastOperation operation{};
  operation.dtype = parse_dtype(dtype);
  if (operation.dtype == DType::kFloat64) {
    throw std::invalid_argument("dtype: expected float32, bfloat16 or float16, got float64: no switch adds it");
  }
  operation.local = out;
  operation.multicast = multicast;
  operation.adds = true;
  check_size(count, "count");
  add_multicast(stream, operation, count * static_cast<std::int64_t>(size_of(operation.dtype)), rows, out_pitch,
                beside);
}

void Recording::store_multicast(std::int64_t stream, Address multicast, Address src, std::int64_t row_bytes,
                                std::int64_t rows, std::int64_t src_pitch, std::int64_t beside) {
  MulticastOperation operation{};
  operation.local = src;
  operation.multicast = multicast;
  check_size(row_bytes, "row_bytes");
  add_multicast(stream, operation, row_bytes, rows, src_pitch, beside);
}

void Recording::add_multicast(std::int64_t stream, MulticastOperation operation, std::int64_t row_bytes,
                              std::int64_t rows, std::int64_t pitch, std::int64_t beside) {
  check_address(operation.local, "local");
  check_address(operation.multicast, "multicast");
  check_size(rows, "rows");
  ODY_CHECK_VALUE(rows, <=, std::int64_t{std::numeric_limits<std::uint32_t>::max()}, "rows");
  operation.row_bytes = static_cast<std::uint64_t>(row_bytes);
  operation.rows = static_cast<std::uint32_t>(rows);
  operation.pitch = checked_pitch(pitch, operation.row_bytes, rows, "pitch");
  ODY_CHECK_VALUE(operation.row_bytes % kVectorBytes, ==, std::uint64_t{0}, row_bytes,
                  " bytes of a row: expected a multiple of 16");
  if (rows > 1) {
    ODY_CHECK_VALUE(operation.pitch % kVectorBytes, ==, std::uint64_t{0}, "pitch ", pitch,
                    ": expected a multiple of 16 bytes");
  }
  operation.beside = checked_multiprocessors(beside);
  add(stream, operation);
}

void Recording::record(std::int64_t stream, std::int64_t event) {
  ODY_CHECK_VALUE(event, >=, kNone, "event");
  ODY_CHECK_VALUE(event, <, std::int64_t{kMaxEvents}, "event");
  add(stream, RecordOperation{static_cast<int>(event)});
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto index = static_cast<std::size_t>(event);
  if (recorded_events_.size() <= index) recorded_events_.resize(index + 1);
  recorded_events_[index] = true;
}

void Recording::depend(std::int64_t stream, std::int64_t event) {
  ODY_CHECK_VALUE(event, >=, kNone, "event");
  ODY_CHECK_VALUE(event, <, std::int64_t{kMaxEvents}, "event");
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto index = static_cast<std::size_t>(event);
    if (index >= recorded_events_.size() || !recorded_events_[index]) {
      throw std::invalid_argument(concat("event: expected one that an earlier operation records, got ", event));
    }
  }
  add(stream, DependOperation{static_cast<int>(event)});
}

std::size_t Recording::size() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return operations_.size();
}

void Recording::check_run(std::int64_t first, std::int64_t last, std::size_t streams,
                          const std::vector<std::uint64_t>& bases, double timeout_s) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  check_run_locked(first, last, streams, bases, timeout_s);
}

void Recording::check_run_locked(std::int64_t first, std::int64_t last, std::size_t streams,
                                 const std::vector<std::uint64_t>& bases, double timeout_s) const {
  ODY_CHECK_VALUE(first, >=, kNone, "first operation");
  ODY_CHECK_VALUE(last, >=, first, "operations [first, last)");
  ODY_CHECK_VALUE(last, <=, static_cast<std::int64_t>(operations_.size()), "operations [first, last)");
  ODY_CHECK_VALUE(timeout_s, >=, 0.0, "seconds, infinity for no timeout");
  for (std::int64_t i = first; i < last; ++i) {
    const Operation& operation = operations_[static_cast<std::size_t>(i)];
    ODY_CHECK_VALUE(static_cast<std::size_t>(operation.stream), <, streams, "stream of operation ", i);
    const auto check = [&](const char* name, const Address& address, std::size_t alignment) {
      ODY_CHECK_VALUE(static_cast<std::size_t>(address.first), <, bases.size(), "base of ", name, " of operation ", i);
      const std::uint64_t resolved = resolve(address, bases);
      ODY_CHECK_VALUE(resolved, !=, std::uint64_t{0}, name, " of operation ", i, " is a null pointer");
      ODY_CHECK_VALUE(resolved % alignment, ==, std::uint64_t{0}, name, " of operation ", i, " at ", resolved,
                      " is not aligned to ", alignment, " bytes");
    };
    std::visit([&](const auto& what) { visit_addresses(what, check); }, operation.what);
  }
}

MultimemTask multimem_task(const MulticastOperation& operation, const std::vector<std::uint64_t>& bases) {
  return {resolve(operation.local, bases), resolve(operation.multicast, bases), operation.row_bytes / kVectorBytes,
          operation.rows, operation.pitch};
}

ReduceTask reduce_task(const ReduceOperation& operation, const std::vector<std::uint64_t>& bases) {
  ReduceTask task{};
  task.out = resolve(operation.out, bases);
  task.out_pitch = operation.out_pitch;
  task.sources = static_cast<int>(operation.sources.size());
  for (std::size_t i = 0; i < operation.sources.size(); ++i) {
    task.source[i] = resolve(operation.sources[i], bases);
    task.source_pitch[i] = operation.source_pitches[i];
  }
  task.count = operation.count;
  task.rows = operation.rows;
  lay_out(task, size_of(operation.source_dtype), size_of(operation.out_dtype));
  return task;
}

}  // namespace odysseus
