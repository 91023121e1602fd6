// Division and multiples of numbers that are not negative.
#pragma once

#include <cstdint>

#include "common/isa.h"

namespace engine {

constexpr ENGINE_INLINE int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr ENGINE_INLINE int64_t round_up(int64_t a, int64_t multiple) { return divide_up(a, multiple) * multiple; }
constexpr ENGINE_INLINE int64_t round_down(int64_t a, int64_t multiple) { return a / multiple * multiple; }

}  // namespace engine
