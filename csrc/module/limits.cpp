#include "module/limits.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <stdexcept>
#include <thread>
#include <vector>

#include "common/compiled.h"
#include "common/dot_bytes_avx2.h"
#include "common/isa.h"
#include "common/registers_avx512.h"
#if ENGINE_X86
#include <immintrin.h>
#endif

namespace engine {
namespace {

using Clock = std::chrono::steady_clock;

// Keeps the compiler from discarding `value`. Not for vector accumulators: the constraint "m" would keep them in
// memory, and the loop would measure its own spills.
template <class T>
void keep(const T& value) {
    asm volatile("" : : "m"(value) : "memory");
}

// Work a second, summed over all threads: each calls `work(thread)`, which returns how much it did, until the time is
// up. Threads start counting together, and each is rated by its own clock, so that a late start costs nothing.
double rate(int threads, double seconds, const std::function<double(int)>& work) {
    if (threads < 1 || !(seconds > 0)) throw std::invalid_argument("expected at least one thread and some seconds");
    std::vector<double> rates(threads);
    std::atomic<int> waiting{threads};
    std::vector<std::thread> pool;
    const auto run = [&](int thread) {
        work(thread);  // touches the memory and wakes the clock of the core
        --waiting;
        while (waiting.load() > 0) std::this_thread::yield();
        const auto begun = Clock::now();
        double done = 0, passed = 0;
        while (passed < seconds) {
            done += work(thread);
            passed = std::chrono::duration<double>(Clock::now() - begun).count();
        }
        rates[thread] = done / passed;
    };
    for (int thread = 1; thread < threads; ++thread) pool.emplace_back(run, thread);
    run(0);
    for (auto& thread : pool) thread.join();
    double sum = 0;
    for (const double each : rates) sum += each;
    return sum;
}

// A buffer on pages of its own, written once.
struct Buffer {
    explicit Buffer(int64_t bytes) : size((bytes + 4095) / 4096 * 4096), data(std::aligned_alloc(4096, size)) {
        if (data == nullptr) throw std::bad_alloc();
        std::memset(data, 1, size);
    }
    ~Buffer() { std::free(data); }
    Buffer(const Buffer&) = delete;
    int64_t size;
    void* data;
};

std::vector<std::unique_ptr<Buffer>> buffers(int count, int64_t bytes) {
    if (bytes < 1) throw std::invalid_argument("expected a buffer of at least one byte");
    std::vector<std::unique_ptr<Buffer>> made;
    for (int i = 0; i < count; ++i) made.push_back(std::make_unique<Buffer>(bytes));
    return made;
}

// Enough calls on one buffer that the clock is read seldom.
int64_t passes(int64_t bytes) { return std::max<int64_t>(1, (4 << 20) / bytes); }

ENGINE_INLINE uint64_t read_words(const uint64_t* words, int64_t count) {
    uint64_t sum[16] = {};
    for (int64_t i = 0; i < count; i += 16) {
        for (int j = 0; j < 16; ++j) sum[j] ^= words[i + j];
    }
    uint64_t all = 0;
    for (const uint64_t each : sum) all ^= each;
    return all;
}

#if ENGINE_X86
// Enough chains that no instruction waits for another (2 pipes by 4 or 5 cycles); int8 needs registers for operands
// too.
constexpr int kChains = 12, kInt8Chains = 8;
constexpr int kSteps = 1 << 14;

ENGINE_AVX2 double fma_avx2(int) {
    __m256 sum[kChains], a = _mm256_set1_ps(0.5f), b = _mm256_set1_ps(1.5f);
    for (auto& s : sum) s = a;
    for (int i = 0; i < kSteps; ++i) {
#pragma GCC unroll 12
        for (int c = 0; c < kChains; ++c) sum[c] = _mm256_fmadd_ps(sum[c], a, b);
    }
    for (auto& s : sum) asm volatile("" : : "x"(s));
    return 2.0 * 8 * kChains * kSteps;
}
ENGINE_AVX512 double fma_avx512(int) {
    __m512 sum[kChains], a = _mm512_set1_ps(0.5f), b = _mm512_set1_ps(1.5f);
    for (auto& s : sum) s = a;
    for (int i = 0; i < kSteps; ++i) {
#pragma GCC unroll 12
        for (int c = 0; c < kChains; ++c) sum[c] = _mm512_fmadd_ps(sum[c], a, b);
    }
    for (auto& s : sum) asm volatile("" : : "v"(s));
    return 2.0 * 16 * kChains * kSteps;
}

ENGINE_AVX512 double pairs_avx512(int) {
    constexpr int kPairChains = 24;  // 2 pipes by 10 cycles or so
    __m512 sum[kPairChains];
    const __m512i a = _mm512_set1_epi16(0x3f00), b = _mm512_set1_epi16(0x3fc0);  // 0.5, 1.5
#pragma GCC unroll 24
    for (auto& s : sum) s = _mm512_setzero_ps();
    for (int i = 0; i < kSteps; ++i) {
#pragma GCC unroll 24
        for (int c = 0; c < kPairChains; ++c) accumulate_pairs_avx512(sum[c], a, b);
    }
#pragma GCC unroll 24
    for (auto& s : sum) asm volatile("" : : "v"(s));
    return 2.0 * 32 * kPairChains * kSteps;
}

ENGINE_AVX512 double dot_avx512(int) {
    __m512i sum[kChains], a = _mm512_set1_epi8(3), b = _mm512_set1_epi8(5);
    for (auto& s : sum) s = a;
    for (int i = 0; i < kSteps; ++i) {
#pragma GCC unroll 12
        for (int c = 0; c < kChains; ++c) sum[c] = _mm512_dpbusd_epi32(sum[c], a, b);
    }
    for (auto& s : sum) asm volatile("" : : "v"(s));
    return 2.0 * 64 * kChains * kSteps;
}

// Instructions as they stand: a compiler would compute what is the same in every round once, and add moves and spills
// to hide it. A volatile asm stays where it is.
#define ENGINE_INSTRUCTION(name, to, a, b) asm volatile(name " %2, %1, %0" : "=x"(to) : "x"(a), "x"(b))
#define ENGINE_ADD_TO(sum, a) asm volatile("vpaddd %1, %0, %0" : "+x"(sum) : "x"(a))

ENGINE_AVX2 double dot_avx_vnni(int) {
    __m256i sum[kChains] = {};
    const __m256i a = _mm256_set1_epi8(3), b = _mm256_set1_epi8(5);
    for (int i = 0; i < kSteps; ++i) {
#pragma GCC unroll 12
        for (int c = 0; c < kChains; ++c) accumulate_avx_vnni(sum[c], a, b);
    }
    return 2.0 * 32 * kChains * kSteps;
}
// int8 widened to 16 bits beforehand: 16 products by vpmaddwd and vpaddd.
ENGINE_AVX2 double pairs_avx2(int) {
    __m256i sum[kInt8Chains] = {}, a = _mm256_set1_epi16(3), b = _mm256_set1_epi16(5);
    for (int i = 0; i < kSteps; ++i) {
#pragma GCC unroll 8
        for (int c = 0; c < kInt8Chains; ++c) {
            __m256i products;
            ENGINE_INSTRUCTION("vpmaddwd", products, a, b);
            ENGINE_ADD_TO(sum[c], products);
        }
    }
    return 2.0 * 16 * kInt8Chains * kSteps;
}
// Winograd's inner product: 32 products by one vpmaddwd, two vpaddw and one vpaddd.
ENGINE_AVX2 double winograd_avx2(int) {
    __m256i sum[kInt8Chains] = {}, a = _mm256_set1_epi16(3), b = _mm256_set1_epi16(5);
    for (int i = 0; i < kSteps; ++i) {
#pragma GCC unroll 8
        for (int c = 0; c < kInt8Chains; ++c) {
            __m256i x, y;
            ENGINE_INSTRUCTION("vpaddw", x, a, b);
            ENGINE_INSTRUCTION("vpaddw", y, b, a);
            ENGINE_INSTRUCTION("vpmaddwd", x, x, y);
            ENGINE_ADD_TO(sum[c], x);
        }
    }
    return 2.0 * 32 * kInt8Chains * kSteps;
}
// |x| times w with the sign of x: 32 products by vpsignb, vpmaddubsw, vpmaddwd and vpaddd, which can't saturate.
ENGINE_AVX2 double signs_avx2(int) {
    __m256i sum[kInt8Chains] = {}, a = _mm256_set1_epi8(3), b = _mm256_set1_epi8(5), ones = _mm256_set1_epi16(1);
    for (int i = 0; i < kSteps; ++i) {
#pragma GCC unroll 8
        for (int c = 0; c < kInt8Chains; ++c) {
            __m256i pairs;
            ENGINE_INSTRUCTION("vpsignb", pairs, b, a);
            ENGINE_INSTRUCTION("vpmaddubsw", pairs, a, pairs);
            ENGINE_INSTRUCTION("vpmaddwd", pairs, pairs, ones);
            ENGINE_ADD_TO(sum[c], pairs);
        }
    }
    return 2.0 * 32 * kInt8Chains * kSteps;
}
#undef ENGINE_INSTRUCTION
#undef ENGINE_ADD_TO
#endif

}  // namespace

double read_gbps(int64_t bytes, int threads, double seconds) {
    auto* const read = compiled<read_words>(isa_of(best_variant()));
    const auto from = buffers(threads, bytes);
    return 1e-9 * rate(threads, seconds, [&](int thread) {
               const Buffer& buffer = *from[thread];
               uint64_t sum = 0;
               for (int64_t i = 0; i < passes(bytes); ++i) {
                   sum += read(static_cast<const uint64_t*>(buffer.data), buffer.size / 8);
                   keep(sum);
               }
               return static_cast<double>(buffer.size * passes(bytes));
           });
}

double copy_gbps(int64_t bytes, int threads, double seconds) {
    const auto from = buffers(threads, bytes), to = buffers(threads, bytes);
    return 1e-9 * rate(threads, seconds, [&](int thread) {
               for (int64_t i = 0; i < passes(bytes); ++i) {
                   std::memcpy(to[thread]->data, from[thread]->data, from[thread]->size);
                   keep(*static_cast<char*>(to[thread]->data));
               }
               return 2.0 * from[thread]->size * passes(bytes);
           });
}

double fp32_gops(const std::string& isa, int threads, double seconds) {
#if ENGINE_X86
    if (isa == "avx512") return 1e-9 * rate(threads, seconds, fma_avx512);
    if (isa == "avx2" || isa == "avx_vnni") return 1e-9 * rate(threads, seconds, fma_avx2);
#endif
    return 0;
}

double bf16_gops(const std::string& isa, int threads, double seconds) {
#if ENGINE_X86
    if (isa == "avx512" && has_bf16()) return 1e-9 * rate(threads, seconds, pairs_avx512);
#endif
    return 0;
}

std::pair<double, std::string> int8_gops(const std::string& isa, int threads, double seconds) {
    std::pair<double, std::string> best{0, ""};
#if ENGINE_X86
    const auto consider = [&](double (*loop)(int), const char* name) {
        best = std::max(best, {1e-9 * rate(threads, seconds, loop), name});
    };
    if (isa == "avx512") consider(dot_avx512, "vpdpbusd");
    if (isa == "avx_vnni") consider(dot_avx_vnni, "vpdpbusd on 256 bits");
    if (isa == "avx2") {
        consider(pairs_avx2, "vpmaddwd");
        consider(winograd_avx2, "vpmaddwd by Winograd's identity");
        consider(signs_avx2, "vpsignb, vpmaddubsw");
    }
#endif
    return best;
}

}  // namespace engine
