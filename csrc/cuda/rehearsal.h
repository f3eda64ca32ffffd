// A recording whose runs enqueue nothing: they count what a device would be given, and list it.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "enqueuer.h"

namespace odysseus {

// What a stream would be given: addresses first (of words: the epoch's, then the words'), then everything else.
struct Launch {
  std::string kind;
  std::uint64_t stream;
  std::vector<std::uint64_t> addresses;
  std::vector<std::int64_t> values;
};

class Rehearsal : public Recording {
 public:
  // `lists` says whether launches are kept; they are counted in any case.
  explicit Rehearsal(bool lists) : lists_(lists) {}

  // As Program has them.
  std::unique_ptr<Pass> begin(std::int64_t first, std::int64_t last, const std::vector<std::uint64_t>& streams,
                              const std::vector<std::uint64_t>& bases, double timeout_s);
  void run(std::int64_t first, std::int64_t last, const std::vector<std::uint64_t>& streams,
           const std::vector<std::uint64_t>& bases, double timeout_s);

  std::int64_t launched() const;
  // Those of all runs so far, or since they were last taken.
  std::vector<Launch> take_launches();

 private:
  friend class RehearsalPass;

  const bool lists_;
  std::int64_t launched_ = 0;
  std::vector<Launch> launches_;
};

}  // namespace odysseus
