// Sums of several sources, on raw addresses.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "../common/dtype.h"

namespace odysseus {

struct Operand {
  std::uintptr_t address;
  DType dtype;
};

// "float32", "float64", "bfloat16" or "float16"; std::invalid_argument for others.
DType parse_dtype(const std::string& name);

// Throws std::invalid_argument where there are no sources or `out` overlaps one without being the same array.
void check_reduce(const Operand& out, const std::vector<Operand>& sources, std::size_t count);

// out[i] = cast(sources[0][i] + sources[1][i] + ...), added in that order in fp32, or in fp64 where any type is fp64.
// The operands must have passed check_reduce().
void reduce(const Operand& out, const std::vector<Operand>& sources, std::size_t count);

// Instruction set that reduce() uses here: the best that the machine has, unless use_simd() chose another.
const char* simd_name();

// Chooses "avx512", "avx2" or "baseline" for the whole process; std::invalid_argument where the machine lacks it.
void use_simd(const std::string& name);

}  // namespace odysseus
