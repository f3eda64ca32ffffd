// Operations outside of a program, on the stream that the caller names.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "reduce_worker.h"

namespace odysseus {

// out[i] = the sum of sources[...][i], filling the device unless `max_blocks` says otherwise.
void reduce_on_device(std::uint64_t stream, std::uint64_t out, const std::string& out_dtype,
                      const std::vector<std::uint64_t>& sources, const std::string& source_dtype, std::int64_t count,
                      std::int64_t max_blocks);

// The same for rows, on the host, by so many workers one after another; for tests.
void reduce_on_host(std::uint64_t out, const std::string& out_dtype, const std::vector<std::uint64_t>& sources,
                    const std::string& source_dtype, std::int64_t count, std::int64_t rows, std::int64_t out_pitch,
                    const std::vector<std::int64_t>& source_pitches, std::int64_t workers);

// How that reduction's rows are laid out.
ReduceTask reduce_layout(std::uint64_t out, const std::string& out_dtype, const std::vector<std::uint64_t>& sources,
                         const std::string& source_dtype, std::int64_t count, std::int64_t rows,
                         std::int64_t out_pitch, const std::vector<std::int64_t>& source_pitches);

void multimem_reduce(std::uint64_t stream, std::uint64_t out, std::uint64_t multicast, const std::string& dtype,
                     std::int64_t count, std::int64_t max_blocks);

}  // namespace odysseus
