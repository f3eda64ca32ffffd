// Operations on streams as data, and the checks of their arguments; needs no device.
#pragma once

#include <cstdint>
#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "plan.h"
#include "tasks.h"
#include "words.h"

namespace odysseus {

// Index of a base, and bytes behind it.
using Address = std::pair<std::int64_t, std::int64_t>;

struct Words {
  Address epoch;
  std::vector<Address> words;
  std::vector<std::int32_t> values;
};

struct CopyOperation {
  Address dst;
  Address src;
  CopyShape shape;
  bool over_link;
};

struct WaitOperation {
  Words words;
  std::uint32_t tag;
};

struct SignalOperation {
  Words words;
};

struct AdvanceOperation {
  Address epoch;
};

struct ReduceOperation {
  Address out;
  DType out_dtype;
  std::vector<Address> sources;
  DType source_dtype;
  std::uint64_t count;
  std::uint32_t rows;
  std::uint64_t out_pitch;
  std::vector<std::uint64_t> source_pitches;
  std::optional<WaitOperation> wait;  // one word for each source
  int beside;                         // multiprocessors that it may hold beside products, 0 for the whole device
};

// What a multicast address reaches: the sum of all ranks' memory goes to `local`, or `local` to all of them.
struct MulticastOperation {
  Address local;
  Address multicast;
  bool adds;
  DType dtype;  // of a sum
  std::uint64_t row_bytes;
  std::uint32_t rows;
  std::uint64_t pitch;  // of local rows; those behind the multicast address are dense
  int beside;           // as of a reduction
};

struct RecordOperation {
  int event;
};

struct DependOperation {
  int event;
};

struct Operation {
  int stream;
  std::variant<CopyOperation, WaitOperation, SignalOperation, AdvanceOperation, ReduceOperation, MulticastOperation,
               RecordOperation, DependOperation>
      what;
};

// What a reduction may wait for, as given by a caller.
struct ReduceWait {
  std::optional<Address> epoch;
  std::optional<std::vector<Address>> words;
  std::optional<std::vector<std::int64_t>> values;
  std::int64_t tag = 0;
};

constexpr int kMaxStreams = 64;
constexpr int kMaxEvents = 1 << 16;

// Every method throws std::invalid_argument for what can be seen to be wrong before there are bases, and records
// nothing then.
class Recording {
 public:
  virtual ~Recording() = default;

  void copy(std::int64_t stream, Address dst, Address src, std::int64_t row_bytes, std::int64_t rows,
            std::int64_t dst_pitch, std::int64_t src_pitch, bool over_link);
  void wait(std::int64_t stream, Address epoch, const std::vector<Address>& words,
            const std::vector<std::int64_t>& values, std::int64_t tag);
  void signal(std::int64_t stream, Address epoch, const std::vector<Address>& words,
              const std::vector<std::int64_t>& values);
  void advance(std::int64_t stream, Address epoch);
  void reduce(std::int64_t stream, Address out, const std::string& out_dtype, const std::vector<Address>& sources,
              const std::string& source_dtype, std::int64_t count, std::int64_t rows, std::int64_t out_pitch,
              const std::optional<std::vector<std::int64_t>>& source_pitches, const ReduceWait& wait,
              std::int64_t beside = 0);
  void reduce_multicast(std::int64_t stream, Address out, Address multicast, const std::string& dtype,
                        std::int64_t count, std::int64_t rows, std::int64_t out_pitch, std::int64_t beside);
  void store_multicast(std::int64_t stream, Address multicast, Address src, std::int64_t row_bytes, std::int64_t rows,
                       std::int64_t src_pitch, std::int64_t beside);
  void record(std::int64_t stream, std::int64_t event);
  void depend(std::int64_t stream, std::int64_t event);

  std::size_t size() const;

  // Whether operations [first, last) can be run with so many streams and these bases.
  void check_run(std::int64_t first, std::int64_t last, std::size_t streams, const std::vector<std::uint64_t>& bases,
                 double timeout_s) const;

  const std::vector<Operation>& operations() const { return operations_; }

 protected:
  void check_run_locked(std::int64_t first, std::int64_t last, std::size_t streams,
                        const std::vector<std::uint64_t>& bases, double timeout_s) const;

  mutable std::mutex mutex_;

 private:
  template <class What>
  void add(std::int64_t stream, What what);
  void add_multicast(std::int64_t stream, MulticastOperation operation, std::int64_t row_bytes, std::int64_t rows,
                     std::int64_t pitch, std::int64_t beside);

  std::vector<Operation> operations_;
  std::vector<bool> recorded_events_;
};

// The multicast operation at its addresses.
MultimemTask multimem_task(const MulticastOperation& operation, const std::vector<std::uint64_t>& bases);

// The reduction at its addresses, laid out; it must have passed check_run() unless it has no elements.
ReduceTask reduce_task(const ReduceOperation& operation, const std::vector<std::uint64_t>& bases);

inline std::uint64_t resolve(const Address& address, const std::vector<std::uint64_t>& bases) {
  return bases[static_cast<std::size_t>(address.first)] + static_cast<std::uint64_t>(address.second);
}

}  // namespace odysseus
