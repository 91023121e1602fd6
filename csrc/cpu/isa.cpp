#include "common/isa.h"

namespace engine {

Isa best_isa() {
#if ENGINE_X86
    __builtin_cpu_init();
#if defined(ENGINE_EMULATE_AVX512)
    return Isa::avx512;
#else
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                      __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2") &&
                      __builtin_cpu_supports("popcnt");
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                        __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512vnni") &&
                        __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vbmi2");
    if (avx2 && avx512) return Isa::avx512;
    if (avx2) return Isa::avx2;
#endif
#endif
    return Isa::portable;
}

std::atomic<int> active_isa{static_cast<int>(best_isa())};

}  // namespace engine

// For engine.backends, by ctypes: what the processor has, what is in use, and a choice among what it has.
extern "C" __attribute__((visibility("default"))) int engine_best_isa() { return static_cast<int>(engine::best_isa()); }
extern "C" __attribute__((visibility("default"))) int engine_active_isa() { return engine::active_isa.load(); }
extern "C" __attribute__((visibility("default"))) int engine_set_isa(int isa) {
    if (isa < 0 || isa > engine_best_isa()) return -1;
    engine::active_isa.store(isa);
    return 0;
}
