// What this machine can do at most, measured: the yardstick that benchmarks hold every result against.
#pragma once

#include <cstdint>
#include <string>
#include <utility>

namespace engine {

// Gigabytes a second that `threads` threads together read, each its own buffer of `bytes`, over and over, for about
// `seconds`. A buffer that fits a cache measures that cache.
double read_gbps(int64_t bytes, int threads, double seconds);

// The same for copying: bytes read and bytes written both count.
double copy_gbps(int64_t bytes, int threads, double seconds);

// 10^9 operations a second (a multiplication and an addition are two) of fused multiply-adds in float32 in registers,
// by the widest instructions of `isa` ("portable", "avx2", "avx512"). 0 where there is no such loop.
double fp32_gops(const std::string& isa, int threads, double seconds);

// Products of bfloat16 added up in fp32; 0 where no instruction does so.
double bf16_gops(const std::string& isa, int threads, double seconds);

// The same for exact sums of int8 products, with the sequence of instructions that reached it: vpdpbusd for avx512; for
// avx2 the fastest of those that can't saturate.
std::pair<double, std::string> int8_gops(const std::string& isa, int threads, double seconds);

}  // namespace engine
