// magnitude_threshold on NVIDIA GPUs: the k-th smallest magnitude by radix selection, without sorting.
//
// The 31 bits of a magnitude in fp32 order as the numbers do. A pass counts the next 11, 10 and 10 of them among the
// weights that agree with what is known of the result, and finds the bin in which the k-th falls. Nothing comes back to
// the CPU in between: rank and bits found stay on the device.
//
// Bytes: the weight once a pass; 16-bit floats have no bits left for the third. Instructions: about 8 a weight, and one
// atomic addition in shared memory for those that count, to one of four copies of the bins, as many weights share a
// bin: in the first pass, of normally distributed ones, a warp's 32 fall on about 12 bins. A row (scope "row") belongs
// to one block, which finds it in L1 or L2 after its first pass.
//
// Of millions of 16-bit floats one pass is enough almost always: cuda/bracket.cuh. The others then have nothing to do.

#include <algorithm>
#include <cmath>
#include <string>

#include "common/dtype.h"
#include "common/round.h"
#include "cuda/bracket.cuh"

namespace engine::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / kWarp;
constexpr int kBins = 2048, kCopies = 4, kPasses = 3;
constexpr int kBlocksAProcessor = 4;

struct Digit {
    int shift, bits;
};
ENGINE_INLINE Digit digit_of(int pass) { return pass == 0 ? Digit{20, 11} : pass == 1 ? Digit{10, 10} : Digit{0, 10}; }

// What is known of the result: its upper bits, and its rank (from 1) among the weights that share them.
struct Known {
    unsigned long long rank;
    uint64_t key;
};

struct Candidates {
    uint32_t key;
    Digit digit;
    bool all;
    __device__ bool has(uint32_t magnitude) const {
        return all || (magnitude ^ key) >> (digit.shift + digit.bits) == 0;
    }
    __device__ uint32_t bin(uint32_t magnitude) const { return magnitude >> digit.shift & ((1u << digit.bits) - 1); }
};

// Adds w[first], w[first + step], ... of groups of 16 bytes to the bins, and what is left of the array element by
// element.
template <class T>
__device__ inline void count(const T* w, int64_t n, int64_t first, int64_t step, const Candidates& candidates,
                             unsigned* bins) {
    constexpr int kEach = 16 / sizeof(T);
    struct alignas(16) Group {
        T at[kEach];
    };
    const bool aligned = reinterpret_cast<uintptr_t>(w) % 16 == 0;
    const int64_t groups = aligned ? n / kEach : 0;
    for (int64_t i = first; i < groups; i += step) {
        const Group group = reinterpret_cast<const Group*>(w)[i];
#pragma unroll
        for (int j = 0; j < kEach; ++j) {
            const uint32_t magnitude = magnitude_bits(group.at[j]);
            if (candidates.has(magnitude)) atomicAdd(&bins[candidates.bin(magnitude)], 1u);
        }
    }
    for (int64_t i = groups * kEach + first; i < n; i += step) {
        const uint32_t magnitude = magnitude_bits(w[i]);
        if (candidates.has(magnitude)) atomicAdd(&bins[candidates.bin(magnitude)], 1u);
    }
}

// The bin in which the rank-th falls goes into `known`, by the thread that finds it. A block of kThreads calls.
template <class Count>
__device__ inline void find(const Count* bins,  // [kBins]
                            Digit digit, const Known& before, Known* known) {
    constexpr int kEach = kBins / kThreads;
    ENGINE_SHARED(warp_sums, uint64_t[kWarps]);
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    uint64_t own = 0;
    for (int i = 0; i < kEach; ++i) own += bins[threadIdx.x * kEach + i];
    const uint64_t through = sum_through(own);
    if (lane == kWarp - 1) warp_sums[warp] = through;
    __syncthreads();
    uint64_t sum = through - own;
    for (int i = 0; i < warp; ++i) sum += warp_sums[i];
    if (sum < before.rank && before.rank <= sum + own) {
        uint32_t bin = threadIdx.x * kEach;
        while (sum + bins[bin] < before.rank) sum += bins[bin++];
        *known = {before.rank - sum, before.key | static_cast<uint64_t>(bin) << digit.shift};
    }
}

// A pass over one of the tensors.
template <class T>
__global__ void __launch_bounds__(kThreads) count_kernel(const T* w,  // [n]
                                                         int64_t n,
                                                         const Known* known,         // [1], not read in pass 0
                                                         unsigned long long* total,  // [kBins]
                                                         int pass, const Bracket* bracket) {
    if (bracket->found) return;
    ENGINE_SHARED(bins, unsigned[kCopies][kBins]);
    for (int i = threadIdx.x; i < kCopies * kBins; i += kThreads) bins[i / kBins][i % kBins] = 0;
    __syncthreads();
    const Candidates candidates{pass == 0 ? 0u : static_cast<uint32_t>(known->key), digit_of(pass), pass == 0};
    count(w, n, static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x, static_cast<int64_t>(gridDim.x) * kThreads,
          candidates, bins[threadIdx.x / kWarp % kCopies]);
    __syncthreads();
    for (int bin = threadIdx.x; bin < kBins; bin += kThreads) {
        unsigned long long sum = 0;
        for (int copy = 0; copy < kCopies; ++copy) sum += bins[copy][bin];
        if (sum > 0) atomicAdd(&total[bin], sum);
    }
}

// One block, after a pass. Writes the result as far as it is known; after the last pass it is.
__global__ void __launch_bounds__(kThreads) find_kernel(const unsigned long long* total,  // [kBins]
                                                        Known* known,                     // [1]
                                                        unsigned long long rank, int pass, const Bracket* bracket,
                                                        float* threshold) {  // []
    if (bracket->found) return;
    const Known before = pass == 0 ? Known{rank, 0} : *known;
    __syncthreads();
    find(total, digit_of(pass), before, known);
    __syncthreads();
    if (threadIdx.x == 0) *threshold = std::bit_cast<float>(static_cast<uint32_t>(known->key));
}

// One block, after between_kernel: the result, if it is in the bracket.
template <class T>
__global__ void __launch_bounds__(kThreads) bracketed_kernel(const unsigned long long* between,  // [kBins]
                                                             Bracket* bracket,
                                                             Known* known,  // [1], 0
                                                             unsigned long long n, unsigned long long rank,
                                                             float* threshold) {  // []
    const unsigned long long below = n - bracket->not_below;
    if (rank <= below) return;
    find(between, digit_of(0), {rank - below, 0}, known);
    __syncthreads();
    if (threadIdx.x > 0 || known->rank == 0) return;
    bracket->found = 1;
    const auto magnitude = bracket->low + static_cast<uint32_t>(known->key >> digit_of(0).shift);
    *threshold = std::bit_cast<float>(float_bits<T>(magnitude));
}

// A row a block.
template <class T>
__global__ void __launch_bounds__(kThreads) rows_kernel(const T* weight,   // [rows, columns]
                                                        float* threshold,  // [rows]
                                                        int64_t columns, unsigned long long rank, int passes) {
    ENGINE_SHARED(bins, unsigned[kCopies][kBins]);
    ENGINE_SHARED(known, Known);
    const T* w = weight + static_cast<int64_t>(blockIdx.x) * columns;
    Known before{rank, 0};
    for (int pass = 0; pass < passes; ++pass) {
        for (int i = threadIdx.x; i < kCopies * kBins; i += kThreads) bins[i / kBins][i % kBins] = 0;
        __syncthreads();
        const Candidates candidates{static_cast<uint32_t>(before.key), digit_of(pass), pass == 0};
        count(w, columns, threadIdx.x, kThreads, candidates, bins[threadIdx.x / kWarp % kCopies]);
        __syncthreads();
        for (int bin = threadIdx.x; bin < kBins; bin += kThreads) {
            for (int copy = 1; copy < kCopies; ++copy) bins[0][bin] += bins[copy][bin];
        }
        __syncthreads();
        find(bins[0], digit_of(pass), before, &known);
        __syncthreads();
        before = known;
        __syncthreads();
    }
    if (threadIdx.x == 0) threshold[blockIdx.x] = std::bit_cast<float>(static_cast<uint32_t>(before.key));
}

// round(sparsity * n), half to even, as Python's.
unsigned long long rank_of(double sparsity, int64_t n) {
    return static_cast<unsigned long long>(std::nearbyint(sparsity * static_cast<double>(n)));
}

int passes_for(ScalarType dtype) { return dtype == ScalarType::Float ? kPasses : kPasses - 1; }

Tensor rows_threshold(const Tensor& weight, double sparsity) {
    constexpr const char* kWhat = "magnitude_threshold: rows_kernel";
    STD_TORCH_CHECK(weight.dim() == 2, "magnitude_threshold: weight: expected shape [N, K]");
    const int64_t rows = weight.size(0), columns = weight.size(1);
    STD_TORCH_CHECK(columns < int64_t{1} << 32, "magnitude_threshold: weight: expected rows of less than 2**32");
    Tensor threshold = new_tensor(weight, {rows, 1}, ScalarType::Float);
    float* to = mutable_data<float>(threshold);
    const OnDeviceOf device(weight);
    const unsigned long long rank = rank_of(sparsity, columns);
    dispatch_float(weight.scalar_type(), "magnitude_threshold: weight", [&](auto zero) {
        using T = decltype(zero);
        if (rows == 0) return;
        if (rank == 0) return fill_zero(to, rows * sizeof(float), kWhat, device);
        launch(rows_kernel<T>, kWhat, rows, kThreads, device, data<T>(weight), to, columns, rank,
               passes_for(weight.scalar_type()));
    });
    return threshold;
}

// Whether the weights, contiguous, are of one 16-bit type and aligned.
bool by_bracket(const std::vector<Tensor>& weights) {
    return std::all_of(weights.begin(), weights.end(), [&](const Tensor& weight) {
        return weight.scalar_type() != ScalarType::Float && weight.scalar_type() == weights[0].scalar_type() &&
               reinterpret_cast<uintptr_t>(weight.const_data_ptr()) % 16 == 0;
    });
}

template <class T>
void try_bracket_of(const std::vector<Tensor>& weights, int64_t n, unsigned long long rank, unsigned* sample,
                    Bracket* bracket, unsigned long long* between, Known* known, float* threshold,
                    const OnDeviceOf& device) {
    constexpr const char* kWhat = "magnitude_threshold: between_kernel";
    find_bracket<T>(weights, n, rank, sample, bracket, device);
    for (const Tensor& weight : weights) {
        constexpr int64_t kWork = 8 * kBracketThreads * kBracketChunks;
        const int64_t blocks = std::min<int64_t>(divide_up(weight.numel(), kWork), device.processors() * 8);
        launch(between_kernel<T>, kWhat, blocks, kBracketThreads, device, data<T>(weight), weight.numel(), bracket,
               between);
    }
    launch(bracketed_kernel<T>, kWhat, 1, kThreads, device, between, bracket, known, static_cast<unsigned long long>(n),
           rank, threshold);
}

template <class... Args>
void try_bracket(const std::vector<Tensor>& weights, Args&&... args) {
    if (weights[0].scalar_type() == ScalarType::Half) return try_bracket_of<Half>(weights, args...);
    try_bracket_of<BFloat16>(weights, args...);
}

Tensor tensors_threshold(const std::vector<Tensor>& weights_in, double sparsity) {
    constexpr const char* kWhat = "magnitude_threshold: count_kernel";
    std::vector<Tensor> weights;
    int64_t n = 0;
    int passes = 0;
    for (const Tensor& weight : weights_in) {
        dispatch_float(weight.scalar_type(), "magnitude_threshold: weight", [](auto) {});
        STD_TORCH_CHECK(weight.device() == weights_in[0].device(),
                        "magnitude_threshold: weight: expected all on one device");
        weights.push_back(as_contiguous(weight));
        n += weight.numel();
        passes = std::max(passes, passes_for(weight.scalar_type()));
    }
    Tensor threshold = new_tensor(weights[0], {}, ScalarType::Float);
    float* to = mutable_data<float>(threshold);
    const OnDeviceOf device(weights[0]);
    const unsigned long long rank = rank_of(sparsity, n);
    if (rank == 0) {
        fill_zero(to, sizeof(float), kWhat, device);
        return threshold;
    }
    // `known`, a bracket, each pass's bins; what is between, and the sample's bins.
    constexpr int64_t kBracketAt = 2, kBinsAt = 5, kBetweenAt = kBinsAt + kPasses * kBins,
                      kSampleAt = kBetweenAt + kBins;
    constexpr int64_t kAll = kSampleAt + kSampleBins / 2;
    const bool one_pass = n >= kBracketFrom && by_bracket(weights);
    const int64_t words = one_pass ? kAll : kBetweenAt;
    Tensor scratch = new_tensor(weights[0], {words}, ScalarType::Long);
    fill_zero(scratch.mutable_data_ptr(), words * sizeof(int64_t), kWhat, device);
    auto* begin = static_cast<unsigned long long*>(scratch.mutable_data_ptr());
    auto* known = reinterpret_cast<Known*>(begin);
    auto* bracket = reinterpret_cast<Bracket*>(begin + kBracketAt);
    auto* bins = begin + kBinsAt;
    if (one_pass) {
        try_bracket(weights, n, rank, reinterpret_cast<unsigned*>(begin + kSampleAt), bracket, begin + kBetweenAt,
                    known, to, device);
    }
    for (int pass = 0; pass < passes; ++pass, bins += kBins) {
        for (const Tensor& weight : weights) {
            dispatch_float(weight.scalar_type(), "magnitude_threshold: weight", [&](auto zero) {
                using T = decltype(zero);
                const int64_t size = weight.numel(), work = divide_up(size, 8 * kThreads);
                const int64_t blocks = std::min<int64_t>(work, device.processors() * kBlocksAProcessor);
                launch(count_kernel<T>, kWhat, blocks, kThreads, device, data<T>(weight), size, known, bins, pass,
                       bracket);
            });
        }
        launch(find_kernel, "magnitude_threshold: find_kernel", 1, kThreads, device, bins, known, rank, pass, bracket,
               to);
    }
    return threshold;
}

void check_sparsity(double sparsity) {
    STD_TORCH_CHECK(sparsity >= 0 && sparsity < 1, "magnitude_threshold: sparsity: expected a number in [0, 1)");
}

Tensor magnitude_threshold(Tensor weight, double sparsity, std::string scope) {
    check_sparsity(sparsity);
    STD_TORCH_CHECK(scope == "tensor" || scope == "row", "magnitude_threshold: scope: expected tensor or row");
    if (scope == "row") return rows_threshold(as_contiguous(weight), sparsity);
    return tensors_threshold({weight}, sparsity);
}

Tensor magnitude_threshold_of_list(std::vector<Tensor> weights, double sparsity) {
    check_sparsity(sparsity);
    STD_TORCH_CHECK(!weights.empty(), "magnitude_threshold_of_list: weights: expected at least one");
    return tensors_threshold(weights, sparsity);
}

}  // namespace
}  // namespace engine::cuda

STABLE_TORCH_LIBRARY_IMPL(engine, CUDA, m) {
    m.impl("magnitude_threshold", TORCH_BOX(&engine::cuda::magnitude_threshold));
    m.impl("magnitude_threshold_of_list", TORCH_BOX(&engine::cuda::magnitude_threshold_of_list));
}
