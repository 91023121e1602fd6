#include "ring/reduce.h"

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "common/half.h"
#include "common/isa.h"

namespace engine::ring {
namespace {

constexpr size_t kBlock = 1024;  // elements added up at a time: stays in the first cache

// What elements of type T are added up in. 32-bit integers are in 64 bits, so that their average can't overflow.
template <class T>
struct Accumulator {
    using type = T;
};
template <>
struct Accumulator<Half> {
    using type = float;
};
template <>
struct Accumulator<BFloat16> {
    using type = float;
};
template <>
struct Accumulator<int32_t> {
    using type = int64_t;
};

template <class A, class T>
ENGINE_INLINE A load(T x) {
    if constexpr (sizeof(T) == 2)
        return to_float(x);
    else
        return static_cast<A>(x);
}

template <class T, class A>
ENGINE_INLINE T store(A x) {
    if constexpr (sizeof(T) == 2)
        return from_float<T>(x);
    else
        return static_cast<T>(x);
}

// A NaN on either side wins, as in torch.maximum.
template <Op op, class A>
ENGINE_INLINE A combine(A a, A b) {
    if constexpr (op == Op::max) return b > a || b != b ? b : a;
    if constexpr (op == Op::min) return b < a || b != b ? b : a;
    if constexpr (std::is_same_v<A, int64_t>)  // wraps around, as torch's sums do
        return static_cast<int64_t>(static_cast<uint64_t>(a) + static_cast<uint64_t>(b));
    else
        return a + b;
}

// Combines what is there so far, in T or in A, with the last rank's elements. result may be one of both.
template <class T, Op op, class X>
ENGINE_INLINE void finish(const X* so_far, const T* last, int world_size, size_t count, T* result, T* copy) {
    using A = typename Accumulator<T>::type;
    const auto value = [&](size_t i) __attribute__((always_inline)) {
        const A x = combine<op>(load<A>(so_far[i]), load<A>(last[i]));
        return store<T>(op == Op::avg ? x / static_cast<A>(world_size) : x);
    };
    if (copy) {
#pragma GCC ivdep
        for (size_t i = 0; i < count; ++i) result[i] = copy[i] = value(i);
    } else {
#pragma GCC ivdep
        for (size_t i = 0; i < count; ++i) result[i] = value(i);
    }
}

template <class T, Op op>
ENGINE_INLINE void reduce_body(const void* const* sources, int world_size, size_t n, void* result, void* copy) {
    using A = typename Accumulator<T>::type;
    alignas(64) A sum[kBlock];  // of all ranks but the last
    for (size_t start = 0; start < n; start += kBlock) {
        const size_t count = std::min(kBlock, n - start);
        const T* first = static_cast<const T*>(sources[0]) + start;
        const T* last = static_cast<const T*>(sources[world_size - 1]) + start;
        T *to = static_cast<T*>(result) + start, *to_copy = copy ? static_cast<T*>(copy) + start : nullptr;
        if (world_size == 2) {
            finish<T, op>(first, last, world_size, count, to, to_copy);
            continue;
        }
        for (size_t i = 0; i < count; ++i) sum[i] = load<A>(first[i]);
        for (int rank = 1; rank + 1 < world_size; ++rank) {
            const T* next = static_cast<const T*>(sources[rank]) + start;
            for (size_t i = 0; i < count; ++i) sum[i] = combine<op>(sum[i], load<A>(next[i]));
        }
        finish<T, op>(sum, last, world_size, count, to, to_copy);
    }
}

template <class T, Op op>
void reduce_portable(const void* const* sources, int world_size, size_t n, void* result, void* copy) {
    reduce_body<T, op>(sources, world_size, n, result, copy);
}

#if ENGINE_X86
template <class T, Op op>
ENGINE_AVX2 void reduce_avx2(const void* const* sources, int world_size, size_t n, void* result, void* copy) {
    reduce_body<T, op>(sources, world_size, n, result, copy);
}
#endif

template <class T, Op op>
void reduce_op(const void* const* sources, int world_size, size_t n, void* result, void* copy) {
#if ENGINE_X86
    if (isa() >= Isa::avx2) return reduce_avx2<T, op>(sources, world_size, n, result, copy);
#endif
    reduce_portable<T, op>(sources, world_size, n, result, copy);
}

template <class T>
void reduce_dtype(const void* const* sources, int world_size, size_t n, void* result, void* copy, Op op) {
    switch (op) {
        case Op::sum:
            return reduce_op<T, Op::sum>(sources, world_size, n, result, copy);
        case Op::avg:
            return reduce_op<T, Op::avg>(sources, world_size, n, result, copy);
        case Op::max:
            return reduce_op<T, Op::max>(sources, world_size, n, result, copy);
        case Op::min:
            return reduce_op<T, Op::min>(sources, world_size, n, result, copy);
    }
}

}  // namespace

size_t element_size(Dtype dtype) {
    switch (dtype) {
        case Dtype::float64:
        case Dtype::int64:
            return 8;
        case Dtype::float16:
        case Dtype::bfloat16:
            return 2;
        default:
            return 4;
    }
}

void reduce(const void* const* sources, int world_size, size_t n, void* result, void* copy, Dtype dtype, Op op) {
    switch (dtype) {
        case Dtype::float32:
            return reduce_dtype<float>(sources, world_size, n, result, copy, op);
        case Dtype::float64:
            return reduce_dtype<double>(sources, world_size, n, result, copy, op);
        case Dtype::float16:
            return reduce_dtype<Half>(sources, world_size, n, result, copy, op);
        case Dtype::bfloat16:
            return reduce_dtype<BFloat16>(sources, world_size, n, result, copy, op);
        case Dtype::int32:
            return reduce_dtype<int32_t>(sources, world_size, n, result, copy, op);
        case Dtype::int64:
            return reduce_dtype<int64_t>(sources, world_size, n, result, copy, op);
    }
}

}  // namespace engine::ring
