// engine._native: what is no tensor op. The processor's description, what the machine can do at most, and the ring.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <string>

#include "module/limits.h"
#include "module/ring.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace py = pybind11;

namespace {

// Instruction sets that the kernels care about; empty where the processor is no x86.
std::map<std::string, bool> features() {
    std::map<std::string, bool> found;
#if defined(__x86_64__)
    __builtin_cpu_init();
#define FEATURE(name) found[name] = __builtin_cpu_supports(name)
    FEATURE("avx2");
    FEATURE("fma");
    FEATURE("bmi2");
    FEATURE("avx512f");
    FEATURE("avx512bw");
    FEATURE("avx512vnni");
    FEATURE("avx512vbmi");
    FEATURE("avx512vbmi2");
#undef FEATURE
    unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
    if (__get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx)) {
        found["avxvnni"] = (eax >> 4) & 1;
        found["avx512bf16"] = (eax >> 5) & 1;
    }
#endif
    return found;
}

// The processor's own name, "" where it has none to tell.
std::string name() {
    std::string brand;
#if defined(__x86_64__)
    unsigned regs[4];
    for (unsigned leaf = 0x80000002; leaf <= 0x80000004; ++leaf) {
        if (!__get_cpuid(leaf, &regs[0], &regs[1], &regs[2], &regs[3])) return "";
        brand.append(reinterpret_cast<const char*>(regs), sizeof(regs));
    }
    brand = brand.c_str();  // ends at the first zero byte
#endif
    return brand;
}

}  // namespace

PYBIND11_MODULE(_native, m) {
    m.doc() = "What the engine needs from C++ that is no tensor op.";
    m.def("cpu_name", &name, "The processor's brand string.");
    const auto nogil = py::call_guard<py::gil_scoped_release>();
    m.def("read_gbps", &engine::read_gbps, py::arg("bytes"), py::arg("threads"), py::arg("seconds"), nogil);
    m.def("copy_gbps", &engine::copy_gbps, py::arg("bytes"), py::arg("threads"), py::arg("seconds"), nogil);
    m.def("fp32_gops", &engine::fp32_gops, py::arg("isa"), py::arg("threads"), py::arg("seconds"), nogil);
    m.def("bf16_gops", &engine::bf16_gops, py::arg("isa"), py::arg("threads"), py::arg("seconds"), nogil);
    m.def("int8_gops", &engine::int8_gops, py::arg("isa"), py::arg("threads"), py::arg("seconds"), nogil);
    m.def("cpu_features", &features, "Instruction sets by name, with whether the processor has them.");
    engine::bind_ring(m);
}
