// Every instruction that C++ has no word for, each behind a name and beside its twin in plain C++, which says exactly
// which lane holds what and runs where kernels are emulated on a CPU.
//
// In a matrix product of one warp, lane = 4 g + t. A fragment is described in bytes, as it is the same for int8 and for
// 16-bit floats: a "row" has 32 bytes of the summed dimension, of which lane (g, t) holds four from byte 4t on and four
// from byte 16 + 4t on. tests/cuda/test_lanes.py has these layouts from CuTe, LLVM and PyTorch, and compares.
#pragma once

#include <cstdint>

#include "common/half.h"
#include "cuda/launch.h"

namespace engine::cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// Fragments of D[16, 8] += A[16, 32 bytes] · B[8, 32 bytes]ᵀ.
struct FragmentA {
    uint32_t at[4];  // row g low bytes, row g + 8 low, row g high, row g + 8 high
};
struct FragmentB {
    uint32_t at[2];  // row g low bytes, high
};
// A 2:4 sparse A fragment holds 32 bytes a row that stand for 64: of each four elements the two kept, which the row's
// metadata names, four bits a group, the lower place in the lower two. B then has 64 bytes a row, in four registers:
// bytes [16 i + 4t, ...) of row g. The metadata of int8 is 64 bits a row: lane (g, t) gives 32 of them, of row g + 8 (t
// % 2), the upper half where t >= 2. Of 16-bit floats it is 32: lane (g, t < 2) gives 16 of row g (its low half) and 16
// of row g + 8 (its high half), the upper ones where t = 1; what lanes with t >= 2 give is not read.
struct FragmentB2 {
    uint32_t at[4];
};
template <class Acc>
struct FragmentD {
    Acc at[4];  // D[g][2t], D[g][2t + 1], D[g + 8][2t], D[g + 8][2t + 1]
};

#if defined(__CUDACC__)

// Byte i of the result is byte `selector >> 4i & 7` of (b, a), a being bytes 0 to 3.
// Not __byte_perm, which clears the selector's fourth bits first.
__device__ inline uint32_t byte_permute(uint32_t a, uint32_t b, uint32_t selector) {
    uint32_t result;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(selector));
    return result;
}
// sum + the products of the bytes of a and b, unsigned.
__device__ inline uint32_t byte_dot(uint32_t a, uint32_t b, uint32_t sum) { return __dp4a(a, b, sum); }
// The low word of (high, low) >> shift % 32.
__device__ inline uint32_t funnel_right(uint32_t low, uint32_t high, uint32_t shift) {
    return __funnelshift_r(low, high, shift);
}

// The same address as 32 bits, by which shared memory is read without a 64-bit register.
using SharedAddress = uint32_t;
__device__ inline SharedAddress shared_address(const void* shared) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}
// A value that is to stay in its register, where the compiler would rather compute it again.
__device__ inline uint32_t kept(uint32_t value) {
    asm volatile("" : "+r"(value));
    return value;
}
__device__ inline const uint8_t* kept(const uint8_t* value) {
    asm volatile("" : "+l"(value));
    return value;
}
__device__ inline uint32_t load_shared(SharedAddress at) {
    uint32_t value;
    asm volatile("ld.shared.b32 %0, [%1];" : "=r"(value) : "r"(at) : "memory");
    return value;
}
__device__ inline void store_shared_byte(SharedAddress at, uint8_t value) {
    asm volatile("st.shared.b8 [%0], %1;" ::"r"(at), "r"(static_cast<uint32_t>(value)) : "memory");
}
// Where `condition` is not 0: low = high, and high is the word at `at`, which moves on. No branch: lanes differ. `one`
// and `four` are 1 and 4, which the compiler must not know: multiplications have a pipe of their own, moves and sums
// wait for that of shifts and permutations.
__device__ inline void next_word_if(uint32_t condition, uint32_t& low, uint32_t& high, SharedAddress& at, uint32_t one,
                                    uint32_t four) {
    asm volatile(
        "{.reg .pred p; setp.ne.u32 p, %3, 0; @p mad.lo.u32 %0, %1, %4, 0; @p ld.shared.b32 %1, [%2]; @p mad.lo.u32 "
        "%2, %5, %4, %2;}"
        : "+r"(low), "+r"(high), "+r"(at)
        : "r"(condition), "r"(one), "r"(four)
        : "memory");
}

// Asks for the cache line of an address to be brought to L2.
__device__ inline void prefetch_to_l2(const void* at) { asm volatile("prefetch.global.L2 [%0];" ::"l"(at)); }

// A kernel that was started by launch_dependent may begin once every block of the one before has called
// allow_next_kernel. It sees what that one has written after wait_for_previous_kernel.
__device__ inline void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
__device__ inline void allow_next_kernel() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Puts the low bytes of `value` there if any of `bits` is set, and moves on behind them: in three instructions.
template <int kBytes>
__device__ inline void push_if(uint32_t bits, SharedAddress& to, uint32_t value) {
    if constexpr (kBytes == 1)
        asm volatile("{ .reg .pred p; setp.ne.u32 p, %1, 0; @p st.shared.u8 [%0], %2; @p add.u32 %0, %0, 1; }"
                     : "+r"(to)
                     : "r"(bits), "r"(value)
                     : "memory");
    if constexpr (kBytes == 2)
        asm volatile("{ .reg .pred p; setp.ne.u32 p, %1, 0; @p st.shared.u16 [%0], %2; @p add.u32 %0, %0, 2; }"
                     : "+r"(to)
                     : "r"(bits), "r"(value)
                     : "memory");
    if constexpr (kBytes == 4)
        asm volatile("{ .reg .pred p; setp.ne.u32 p, %1, 0; @p st.shared.u32 [%0], %2; @p add.u32 %0, %0, 4; }"
                     : "+r"(to)
                     : "r"(bits), "r"(value)
                     : "memory");
}

// Copies 16 bytes into shared memory, both sides aligned, past the registers and L1; there after copy_wait and, for
// other threads, a barrier.
__device__ inline void copy_16_async(void* to_shared, const void* from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to_shared)), "l"(from) : "memory");
}
// The same of 8 bytes, by way of L1.
__device__ inline void copy_8_async(void* to_shared, const void* from) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(shared_address(to_shared)), "l"(from) : "memory");
}
__device__ inline void copy_16_async(SharedAddress to, const void* from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}
// No branch: lanes differ.
__device__ inline void copy_16_async_if(bool condition, SharedAddress to, const void* from) {
    asm volatile("{.reg .pred p; setp.ne.u32 p, %2, 0; @p cp.async.cg.shared.global [%0], [%1], 16;}" ::"r"(to),
                 "l"(from), "r"(static_cast<uint32_t>(condition))
                 : "memory");
}
__device__ inline void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits for all but the last kPending groups that this thread has committed.
template <int kPending>
__device__ inline void copy_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Four 8x8 matrices of 16 bits. Lane l gives the address of row l % 8 (16 bytes) of matrix l / 8; at[i] of lane (g, t)
// is bytes [4t, 4t + 4) of row g of matrix i.
__device__ inline void load_matrices(uint32_t (&at)[4], const void* shared_row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(at[0]), "=r"(at[1]), "=r"(at[2]), "=r"(at[3])
                 : "r"(shared_address(shared_row))
                 : "memory");
}

// Volatile: what all lanes must do together may not sink into a branch that only some of them take.
__device__ inline void multiply_add(FragmentD<int32_t>& d, const FragmentA& a, const FragmentB& b, int8_t) {
    asm volatile(
        "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
        "%3};"
        : "+r"(d.at[0]), "+r"(d.at[1]), "+r"(d.at[2]), "+r"(d.at[3])
        : "r"(a.at[0]), "r"(a.at[1]), "r"(a.at[2]), "r"(a.at[3]), "r"(b.at[0]), "r"(b.at[1]));
}
__device__ inline void multiply_add(FragmentD<float>& d, const FragmentA& a, const FragmentB& b, Half) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
        "%3};"
        : "+f"(d.at[0]), "+f"(d.at[1]), "+f"(d.at[2]), "+f"(d.at[3])
        : "r"(a.at[0]), "r"(a.at[1]), "r"(a.at[2]), "r"(a.at[3]), "r"(b.at[0]), "r"(b.at[1]));
}
__device__ inline void multiply_add(FragmentD<float>& d, const FragmentA& a, const FragmentB& b, BFloat16) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, "
        "%2, %3};"
        : "+f"(d.at[0]), "+f"(d.at[1]), "+f"(d.at[2]), "+f"(d.at[3])
        : "r"(a.at[0]), "r"(a.at[1]), "r"(a.at[2]), "r"(a.at[3]), "r"(b.at[0]), "r"(b.at[1]));
}

__device__ inline void multiply_add_sparse(FragmentD<int32_t>& d, const FragmentA& a, uint32_t metadata,
                                           const FragmentB2& b, int8_t) {
    asm volatile(
        "mma.sp::ordered_metadata.sync.aligned.m16n8k64.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9, %10, %11}, {%0, %1, %2, %3}, %12, 0x0;"
        : "+r"(d.at[0]), "+r"(d.at[1]), "+r"(d.at[2]), "+r"(d.at[3])
        : "r"(a.at[0]), "r"(a.at[1]), "r"(a.at[2]), "r"(a.at[3]), "r"(b.at[0]), "r"(b.at[1]), "r"(b.at[2]),
          "r"(b.at[3]), "r"(metadata));
}
__device__ inline void multiply_add_sparse(FragmentD<float>& d, const FragmentA& a, uint32_t metadata,
                                           const FragmentB2& b, Half) {
    asm volatile(
        "mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9, %10, %11}, {%0, %1, %2, %3}, %12, 0x0;"
        : "+f"(d.at[0]), "+f"(d.at[1]), "+f"(d.at[2]), "+f"(d.at[3])
        : "r"(a.at[0]), "r"(a.at[1]), "r"(a.at[2]), "r"(a.at[3]), "r"(b.at[0]), "r"(b.at[1]), "r"(b.at[2]),
          "r"(b.at[3]), "r"(metadata));
}
__device__ inline void multiply_add_sparse(FragmentD<float>& d, const FragmentA& a, uint32_t metadata,
                                           const FragmentB2& b, BFloat16) {
    asm volatile(
        "mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9, %10, %11}, {%0, %1, %2, %3}, %12, 0x0;"
        : "+f"(d.at[0]), "+f"(d.at[1]), "+f"(d.at[2]), "+f"(d.at[3])
        : "r"(a.at[0]), "r"(a.at[1]), "r"(a.at[2]), "r"(a.at[3]), "r"(b.at[0]), "r"(b.at[1]), "r"(b.at[2]),
          "r"(b.at[3]), "r"(metadata));
}

// Loads and stores that order what one block writes before what another reads.
__device__ inline uint64_t load_acquire(const uint64_t* at) {
    uint64_t value;
    asm volatile("ld.acquire.gpu.global.u64 %0, [%1];" : "=l"(value) : "l"(at) : "memory");
    return value;
}
__device__ inline void store_release(uint64_t* at, uint64_t value) {
    asm volatile("st.release.gpu.global.u64 [%0], %1;" ::"l"(at), "l"(value) : "memory");
}

#else

inline uint32_t byte_permute(uint32_t a, uint32_t b, uint32_t selector) {
    const uint64_t both = static_cast<uint64_t>(b) << 32 | a;
    uint32_t result = 0;
    for (int i = 0; i < 4; ++i) {
        const uint32_t which = selector >> (4 * i) & 15;
        if (which & 8) emulated::stop("prmt: replicating a sign is not meant anywhere");
        result |= static_cast<uint32_t>(both >> (8 * which) & 0xff) << (8 * i);
    }
    return result;
}
inline uint32_t byte_dot(uint32_t a, uint32_t b, uint32_t sum) {
    for (int i = 0; i < 4; ++i) sum += (a >> (8 * i) & 0xff) * (b >> (8 * i) & 0xff);
    return sum;
}
inline uint32_t funnel_right(uint32_t low, uint32_t high, uint32_t shift) {
    return static_cast<uint32_t>((static_cast<uint64_t>(high) << 32 | low) >> (shift % 32));
}

using SharedAddress = uint32_t;
inline SharedAddress shared_address(const void* shared) { return emulated::shared_address(shared); }
template <int kBytes>
void push_if(uint32_t bits, SharedAddress& to, uint32_t value) {
    if (bits == 0) return;
    std::memcpy(emulated::at_shared_address(to), &value, kBytes);
    to += kBytes;
}
template <class T>
T kept(T value) {
    return value;
}
inline uint32_t load_shared(SharedAddress at) {
    if (at % 4) emulated::stop("ld.shared: not aligned");
    return *reinterpret_cast<const uint32_t*>(emulated::at_shared_address(at));
}
inline void store_shared_byte(SharedAddress at, uint8_t value) {
    *emulated::at_shared_address(at) = static_cast<char>(value);
}
inline void next_word_if(uint32_t condition, uint32_t& low, uint32_t& high, SharedAddress& at, uint32_t, uint32_t) {
    if (condition == 0) return;
    low = high;
    high = load_shared(at);
    at += 4;
}
inline void prefetch_to_l2(const void*) {}
inline void wait_for_previous_kernel() {}
inline void allow_next_kernel() {}

inline void copy_16_async(void* to_shared, const void* from) {
    if (reinterpret_cast<uintptr_t>(to_shared) % 16 || reinterpret_cast<uintptr_t>(from) % 16)
        emulated::stop("cp.async: not aligned to 16 bytes");
    emulated::copy_later(to_shared, from, 16);
}
inline void copy_8_async(void* to_shared, const void* from) {
    if (reinterpret_cast<uintptr_t>(to_shared) % 8 || reinterpret_cast<uintptr_t>(from) % 8)
        emulated::stop("cp.async: not aligned to 8 bytes");
    emulated::copy_later(to_shared, from, 8);
}
inline void copy_16_async(SharedAddress to, const void* from) {
    copy_16_async(static_cast<void*>(emulated::at_shared_address(to)), from);
}
inline void copy_16_async_if(bool condition, SharedAddress to, const void* from) {
    if (condition) copy_16_async(to, from);
}
inline void copy_commit() { emulated::commit_copies(); }
template <int kPending>
void copy_wait() {
    emulated::wait_for_copies(kPending);
}

inline void load_matrices(uint32_t (&at)[4], const void* shared_row) {
    if (reinterpret_cast<uintptr_t>(shared_row) % 16) emulated::stop("ldmatrix: not aligned to 16 bytes");
    const void* rows[kWarp];
    emulated::all_lanes(shared_row, rows);
    const unsigned lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
    for (unsigned i = 0; i < 4; ++i) std::memcpy(&at[i], static_cast<const char*>(rows[8 * i + g]) + 4 * t, 4);
    __syncwarp();
}

// A row's 32 bytes as elements: of the four lanes that hold it, the low 4 bytes of each, then the high 4 bytes.
template <class T>
struct FragmentRow {
    T at[32 / sizeof(T)];
    void set(unsigned t, uint32_t low, uint32_t high) {
        std::memcpy(at + 4 * t / sizeof(T), &low, 4);
        std::memcpy(at + (16 + 4 * t) / sizeof(T), &high, 4);
    }
};
inline int32_t fragment_product(const FragmentRow<int8_t>& a, const FragmentRow<int8_t>& b) {
    int32_t sum = 0;
    for (int i = 0; i < 32; ++i) sum += a.at[i] * b.at[i];
    return sum;
}
template <class T>
double fragment_product(const FragmentRow<T>& a, const FragmentRow<T>& b) {
    double sum = 0;
    for (int i = 0; i < 16; ++i) sum += static_cast<double>(to_float(a.at[i])) * to_float(b.at[i]);
    return sum;
}

template <class Acc, class T>
void multiply_add(FragmentD<Acc>& d, const FragmentA& a, const FragmentB& b, T) {
    struct Operands {
        FragmentA a;
        FragmentB b;
    };
    emulated::show(Operands{a, b});
    const unsigned lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
    FragmentRow<T> rows[2], columns[2];
    for (unsigned i = 0; i < 4; ++i) {
        const auto row = emulated::shown_by<Operands>(4 * g + i).a;
        rows[0].set(i, row.at[0], row.at[2]);
        rows[1].set(i, row.at[1], row.at[3]);
        for (unsigned j = 0; j < 2; ++j) {
            const auto column = emulated::shown_by<Operands>(4 * (2 * t + j) + i).b;
            columns[j].set(i, column.at[0], column.at[1]);
        }
    }
    for (unsigned i = 0; i < 4; ++i)
        d.at[i] = static_cast<Acc>(d.at[i] + fragment_product(rows[i / 2], columns[i % 2]));
}

template <class Acc, class T>
void multiply_add_sparse(FragmentD<Acc>& d, const FragmentA& a, uint32_t metadata, const FragmentB2& b, T) {
    struct Operands {
        FragmentA a;
        FragmentB2 b;
        uint32_t metadata;
    };
    emulated::show(Operands{a, b, metadata});
    const unsigned lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
    FragmentRow<T> kept[2], column[2][2];  // of rows g and g + 8; of columns 2t and 2t + 1, two halves each
    uint64_t places[2] = {0, 0};
    for (unsigned i = 0; i < 4; ++i) {
        const auto row = emulated::shown_by<Operands>(4 * g + i);
        kept[0].set(i, row.a.at[0], row.a.at[2]);
        kept[1].set(i, row.a.at[1], row.a.at[3]);
        if constexpr (sizeof(T) == 1) {
            places[i % 2] |= static_cast<uint64_t>(row.metadata) << (32 * (i / 2));
        } else if (i < 2) {
            places[0] |= static_cast<uint64_t>(row.metadata & 0xffff) << (16 * i);
            places[1] |= static_cast<uint64_t>(row.metadata >> 16) << (16 * i);
        }
        for (unsigned j = 0; j < 2; ++j) {
            const auto other = emulated::shown_by<Operands>(4 * (2 * t + j) + i).b;
            column[j][0].set(i, other.at[0], other.at[1]);
            column[j][1].set(i, other.at[2], other.at[3]);
        }
    }
    for (unsigned i = 0; i < 4; ++i) {
        FragmentRow<T> met;  // the elements of the column that meet those kept
        constexpr unsigned kKept = 32 / sizeof(T);
        for (unsigned v = 0; v < kKept; ++v) {
            const unsigned k = v / 2 * 4 + (places[i / 2] >> (2 * v) & 3);
            met.at[v] = column[i % 2][k / kKept].at[k % kKept];
        }
        d.at[i] = static_cast<Acc>(d.at[i] + fragment_product(kept[i / 2], met));
    }
}

inline uint64_t load_acquire(const uint64_t* at) { return *at; }
inline void store_release(uint64_t* at, uint64_t value) { *at = value; }

#endif

}  // namespace engine::cuda
