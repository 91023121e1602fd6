#include "common/isa.h"

#if ENGINE_X86
#include <cpuid.h>
#endif

namespace engine {
namespace {

#if ENGINE_X86 && !defined(ENGINE_EMULATE_AVX512)
// Read from cpuid, as not every compiler's __builtin_cpu_supports knows the names. Whether the system saves the
// registers that the instructions use is part of its answer for AVX2, which is asked for beside these.
bool has_f16c_and_lzcnt() {
    unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
    const bool f16c = __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx >> 29 & 1) != 0;
    return f16c && __get_cpuid(0x80000001, &eax, &ebx, &ecx, &edx) != 0 && (ecx >> 5 & 1) != 0;
}

bool has_avx_vnni() {
#if ENGINE_AVX_VNNI
    unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
    return __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) != 0 && (eax >> 4 & 1) != 0;
#else
    return false;
#endif
}
#endif

}  // namespace

bool has_variant(Variant variant) {
    if (variant == Variant::portable) return true;
#if ENGINE_X86
#if defined(ENGINE_EMULATE_AVX512)
    return true;
#else
    __builtin_cpu_init();
    // Every feature that ENGINE_AVX2 and ENGINE_AVX512 compile for.
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                      __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2") &&
                      __builtin_cpu_supports("popcnt") && has_f16c_and_lzcnt();
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                        __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512vnni") &&
                        __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vbmi2");
    if (variant == Variant::avx_vnni) return avx2 && has_avx_vnni();
    return avx2 && (variant == Variant::avx2 || avx512);
#endif
#endif
    return false;
}

Variant best_variant() {
    for (const Variant variant : {Variant::avx512, Variant::avx_vnni, Variant::avx2}) {
        if (has_variant(variant)) return variant;
    }
    return Variant::portable;
}

std::atomic<int> active_variant{static_cast<int>(best_variant())};

}  // namespace engine

// For engine.backends, by ctypes: what the processor has, what is in use, and a choice among what it has.
extern "C" __attribute__((visibility("default"))) int engine_has_variant(int variant) {
    return variant >= 0 && variant <= static_cast<int>(engine::Variant::avx512) &&
           engine::has_variant(static_cast<engine::Variant>(variant));
}
extern "C" __attribute__((visibility("default"))) int engine_active_variant() { return engine::active_variant.load(); }
extern "C" __attribute__((visibility("default"))) int engine_set_variant(int variant) {
    if (!engine_has_variant(variant)) return -1;
    engine::active_variant.store(variant);
    return 0;
}
