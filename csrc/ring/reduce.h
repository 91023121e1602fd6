// Adds up (or compares) one slice of every rank's tensor, in rank order.
#pragma once

#include <cstddef>

namespace engine::ring {

enum class Dtype : int { float32, float64, float16, bfloat16, int32, int64 };
enum class Op : int { sum, avg, max, min };

size_t element_size(Dtype dtype);

// sources: world_size pointers, at least two, to n elements each; result: n elements, may be one of the sources; copy:
// n elements that become the same as result, or null. float16 and bfloat16 are added up in fp32 and rounded once.
void reduce(const void* const* sources, int world_size, size_t n, void* result, void* copy, Dtype dtype, Op op);

}  // namespace engine::ring
