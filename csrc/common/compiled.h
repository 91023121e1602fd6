// Bodies that vectorise by themselves, compiled for each instruction set.
#pragma once

#include "common/isa.h"

namespace engine {

template <auto body>
struct Compiled;
template <class Result, class... Args, Result (*body)(Args...)>  // an ENGINE_INLINE function
struct Compiled<body> {
    static Result portable(Args... args) { return body(args...); }
    ENGINE_AVX2 static Result avx2(Args... args) { return body(args...); }
    ENGINE_AVX512 static Result avx512(Args... args) { return body(args...); }
};

// `body` for an instruction set, the one in use if none is given; `x86` stands in for it on AVX2 and AVX-512.
template <auto body, auto x86 = body>
auto compiled(Isa isa = engine::isa()) {
    if (isa == Isa::avx512) return Compiled<x86>::avx512;
    return isa == Isa::avx2 ? Compiled<x86>::avx2 : Compiled<body>::portable;
}

// The same where AVX-512 gains nothing.
template <auto body>
auto compiled_to_avx2() {
    return isa() == Isa::portable ? Compiled<body>::portable : Compiled<body>::avx2;
}

}  // namespace engine
