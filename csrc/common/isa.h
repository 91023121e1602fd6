// Which instruction set the CPU kernels use. Chosen once when the library loads; a test may force another that the
// processor has.
#pragma once

#include <atomic>

namespace engine {

enum class Isa : int {
    portable = 0,  // plain C++: always works, on every processor
    avx2 = 1,      // AVX2, FMA, F16C, BMI1/2, POPCNT, LZCNT
    avx512 = 2,    // AVX-512 F, BW, DQ, VL, CD with VNNI, VBMI, VBMI2
};

// What can be chosen, worst first, as engine/backends.py numbers it. AVX-VNNI (Intel's processors without AVX-512) is
// AVX2 with vpdpbusd on 256 bits: only products of int8 know of it.
enum class Variant : int { portable = 0, avx2 = 1, avx_vnni = 2, avx512 = 3 };

bool has_variant(Variant variant);  // whether this processor can run it
Variant best_variant();

extern std::atomic<int> active_variant;

inline Isa isa_of(Variant variant) {
    return variant == Variant::avx512 ? Isa::avx512 : variant == Variant::portable ? Isa::portable : Isa::avx2;
}
inline Variant variant() { return static_cast<Variant>(active_variant.load(std::memory_order_relaxed)); }
inline Isa isa() { return isa_of(variant()); }

}  // namespace engine

// A function compiled for an instruction set. GCC does not apply the target of the enclosing function to a lambda, so
// the body of a parallel loop calls a free function that carries it. An ENGINE_INLINE function without one is compiled
// for the function that it is inlined into. has_variant (csrc/cpu/isa.cpp) asks the processor for each feature that is
// named here.
#if defined(__x86_64__)
#define ENGINE_X86 1
#if defined(ENGINE_EMULATE_AVX512)  // a test build: the 512-bit intrinsics are plain functions (tests/native/)
#define ENGINE_AVX512 __attribute__((target("avx2,fma,f16c,bmi,bmi2,popcnt,lzcnt")))
#else
#define ENGINE_AVX512                                                                                                  \
    __attribute__((                                                                                                    \
        target("avx512f,avx512bw,avx512dq,avx512vl,avx512cd,avx512vnni,avx512vbmi,avx512vbmi2,avx2,fma,f16c,bmi,bmi2," \
               "popcnt,lzcnt,prefer-vector-width=512")))
#endif
#define ENGINE_AVX2 __attribute__((target("avx2,fma,f16c,bmi,bmi2,popcnt,lzcnt")))
// Whether the assembler knows the VEX-encoded vpdpbusd of AVX-VNNI, as those of these compilers' age do.
#if !defined(ENGINE_EMULATE_AVX512) && (defined(__clang__) ? __clang_major__ >= 12 : __GNUC__ >= 11)
#define ENGINE_AVX_VNNI 1
#endif
#else
#define ENGINE_X86 0
#define ENGINE_AVX2
#define ENGINE_AVX512
#endif
#if defined(__CUDACC__)  // the arithmetic that CPU and GPU share
#define ENGINE_INLINE __host__ __device__ inline __attribute__((always_inline))
#else
#define ENGINE_INLINE inline __attribute__((always_inline))
#endif

namespace engine {

// Prefetches a line for writing. In assembly, as GCC would emit a prefetch for reading.
ENGINE_INLINE void ask_to_write(const void* line) {
#if ENGINE_X86 && !defined(__CUDACC__)
    asm volatile("prefetchw %0" : : "m"(*static_cast<const char*>(line)));
#else
    __builtin_prefetch(line, 1);
#endif
}

}  // namespace engine
