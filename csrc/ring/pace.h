// Which way of writing into the segments is the faster: into the caches, or past them into memory.
//
// Where two cores share a cache, what one has just written comes to the other at 20 GB/s and more. Where they don't
// (other chiplets, other sockets), the reader fetches every line out of the writer's cache, at 2 to 3 GB/s on Zen 4,
// while memory delivers 10. Which it is depends on where the ranks run, changes when a virtual machine's cores are
// moved, and can only be seen in the time of an operation: now and then, the other way is tried.
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "common/isa.h"
#if ENGINE_X86
#include <emmintrin.h>
#endif

namespace engine::ring {

// A copy past the caches. `to` is at the begin of a cache line.
inline void stream(char* to, const char* from, size_t bytes) {
    size_t i = 0;
#if ENGINE_X86
    for (; i + 64 <= bytes; i += 64)
        for (size_t j = i; j < i + 64; j += 16)
            _mm_stream_si128(reinterpret_cast<__m128i*>(to + j),
                             _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + j)));
    _mm_sfence();  // readers are told by a plain store, which would overtake these
#endif
    std::memcpy(to + i, from + i, bytes - i);
}

// What one rank measured, by the size's power of two; it decides for all.
class Pace {
  public:
    static int size_class(size_t bytes) { return std::min<int>(std::bit_width(bytes), 63); }

    // The size classes that stream from now on, a bit each.
    uint64_t streams() const { return streams_; }

    // An operation of `c` took so long, by this way. Compared are the quickest of some in a row: single ones are slow
    // for many reasons.
    void took(int c, bool streamed, double seconds) {
        Times& its = times_[c];
        if (its.done == 0 || streamed != its.streamed) {
            its.done = 0;
            its.streamed = streamed;
            its.best = seconds;
        }
        its.best = std::min(its.best, seconds);
        --its.until_trial;
        if (++its.done == kInRow) {
            its.done = 0;
            its.seconds[streamed] = its.best;
            const double usual = its.seconds[its.prefers], other = its.seconds[!its.prefers];
            // The worse the other way measured, the less often it is tried again: trials cost about 3 % at most.
            if (streamed != its.prefers)
                its.until_trial =
                    static_cast<int>(kPeriod * std::clamp(std::max(other / usual, usual / other), 1.0, 16.0));
            if (other != 0 && other < 0.9 * usual) its.prefers = !its.prefers;
        }
        const uint64_t bit = uint64_t{1} << c;
        streams_ = its.prefers != (its.until_trial <= 0) ? streams_ | bit : streams_ & ~bit;
    }

  private:
    static constexpr int kInRow = 5, kPeriod = 150;
    struct Times {
        double seconds[2] = {0, 0};  // of an operation, by whether it streams; 0: not known
        bool prefers = false;        // to stream
        int until_trial = kInRow;    // operations; at 0 the other way is tried, until it has been timed
        bool streamed = false;       // the row under way: how it goes, how many are done, the quickest
        int done = 0;
        double best = 0;
    };
    std::array<Times, 64> times_;
    uint64_t streams_ = 0;
};

}  // namespace engine::ring
