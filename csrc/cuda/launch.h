// How a CUDA kernel is started from libtorch's stable ABI: on torch's current stream, with errors raised by name.
// tests/cuda/emulated/cuda/launch.h stands in for this file where kernels run on the CPU.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>

#include <cstdint>
#include <type_traits>

#include "common/tensor.h"

// Declared by shim.h only where torch itself was built with CUDA.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);

// Shared memory of a block, of the type given last.
#define ENGINE_SHARED(name, ...) __shared__ std::type_identity_t<__VA_ARGS__> name
// The same of more than 48 KB, for kernels whose launch is told the size; at most one, and on 1024 bytes.
#define ENGINE_DYNAMIC_SHARED(name, ...)                                     \
    extern __shared__ __align__(1024) unsigned char engine_dynamic_shared[]; \
    auto& name = *reinterpret_cast<std::type_identity_t<__VA_ARGS__>*>(engine_dynamic_shared)

namespace engine::cuda {

inline void check_cuda(cudaError_t error, const char* what) {
    STD_TORCH_CHECK(error == cudaSuccess, what, ": ", cudaGetErrorString(error));
}

// Makes the tensor's device current while it lives, and gives torch's current stream on it.
class OnDeviceOf {
  public:
    explicit OnDeviceOf(const Tensor& t) : guard_(t.get_device_index()), index_(t.get_device_index()) {
        void* stream = nullptr;
        STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(index_, &stream) == AOTI_TORCH_SUCCESS,
                        "engine: torch gives no CUDA stream");
        stream_ = static_cast<cudaStream_t>(stream);
    }
    cudaStream_t stream() const { return stream_; }
    int processors() const {
        int count = 0;
        check_cuda(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, index_), "engine: processors");
        return count;
    }
    // wgmma is of compute capability 9.0 alone, where the library has code for sm_90a.
    bool has_wgmma() const {
        int major = 0, minor = 0;
        check_cuda(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index_), "engine: capability");
        check_cuda(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, index_), "engine: capability");
        return major == 9 && minor == 0;
    }

    // From compute capability 9 on.
    bool overlaps_kernels() const {
        int major = 0;
        check_cuda(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index_), "engine: capability");
        return major >= 9;
    }

  private:
    torch::stable::accelerator::DeviceGuard guard_;
    int32_t index_;
    cudaStream_t stream_;
};

// kernel<<<blocks, threads>>>(args...), where there is anything to do.
template <class... Parameters, class... Args>
void launch(void (*kernel)(Parameters...), const char* what, int64_t blocks, int threads, const OnDeviceOf& device,
            Args... args) {
    if (blocks == 0) return;
    STD_TORCH_CHECK(blocks <= 0x7fffffff, what, ": more blocks than a launch can have");
    kernel<<<static_cast<unsigned>(blocks), threads, 0, device.stream()>>>(args...);
    check_cuda(cudaGetLastError(), what);
}

// kernel<<<blocks, threads, shared>>>(args...) with an attribute, of which id 0 is none.
template <class... Parameters, class... Args>
void launch_with(cudaLaunchAttribute attribute, void (*kernel)(Parameters...), const char* what, int64_t blocks,
                 int threads, int shared, const OnDeviceOf& device, Args... args) {
    if (blocks == 0) return;
    STD_TORCH_CHECK(blocks <= 0x7fffffff, what, ": more blocks than a launch can have");
    if (shared > 48 << 10)
        check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared), what);
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(blocks));
    config.blockDim = dim3(static_cast<unsigned>(threads));
    config.dynamicSmemBytes = static_cast<size_t>(shared);
    config.stream = device.stream();
    config.attrs = &attribute;
    config.numAttrs = attribute.id == cudaLaunchAttributeIgnore ? 0 : 1;
    check_cuda(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(args)...), what);
}

// The same as launch, with `shared` bytes for ENGINE_DYNAMIC_SHARED.
template <class... Parameters, class... Args>
void launch_with_shared(void (*kernel)(Parameters...), const char* what, int64_t blocks, int threads, int shared,
                        const OnDeviceOf& device, Args... args) {
    launch_with(cudaLaunchAttribute{}, kernel, what, blocks, threads, shared, device, args...);
}

// The same after a kernel whose blocks call allow_next_kernel: this one may begin before that one has ended, and calls
// wait_for_previous_kernel before it reads what that one writes (ptx.cuh).
template <class... Parameters, class... Args>
void launch_dependent(void (*kernel)(Parameters...), const char* what, int64_t blocks, int threads, int shared,
                      const OnDeviceOf& device, Args... args) {
    cudaLaunchAttribute attribute{};
    if (device.overlaps_kernels()) attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    launch_with(attribute, kernel, what, blocks, threads, shared, device, args...);
}

// A word of the host's memory at which kernels can write, made when it is first asked for.
class PinnedWord {
  public:
    PinnedWord() = default;
    PinnedWord(const PinnedWord&) = delete;
    PinnedWord& operator=(const PinnedWord&) = delete;
    // An error is ignored: where the process ends, CUDA may have gone before, and its memory with it.
    ~PinnedWord() {
        if (word_ != nullptr) static_cast<void>(cudaFreeHost(word_));
    }
    uint64_t* word(const char* what) {
        if (word_ == nullptr) {
            void* made = nullptr;
            check_cuda(cudaHostAlloc(&made, sizeof(uint64_t), cudaHostAllocPortable | cudaHostAllocMapped), what);
            word_ = static_cast<uint64_t*>(made);
        }
        return word_;
    }

  private:
    uint64_t* word_ = nullptr;
};

// A word of the host's memory that a kernel writes, 0 until then: the CPU learns a number without a copy, and while the
// kernel is still at work. One at a time in a thread.
class HostWord {
  public:
    HostWord(const char* what, const OnDeviceOf& device) : what_(what), stream_(device.stream()) {
        thread_local PinnedWord kept;
        word_ = kept.word(what);
        *word_ = 0;
    }
    volatile uint64_t* on_device() const { return word_; }
    // Waits until it is written.
    uint64_t written() const {
        for (unsigned i = 1; *word_ == 0; ++i) {
            if (i % 4096 != 0) continue;
            const cudaError_t error = cudaStreamQuery(stream_);
            if (error == cudaErrorNotReady) continue;
            check_cuda(error, what_);
            STD_TORCH_CHECK(*word_ != 0, what_, ": the kernel has written nothing");
        }
        return *word_;
    }
    // Waits for the stream; 0 where nothing was written.
    uint64_t after_all() const {
        check_cuda(cudaStreamSynchronize(stream_), what_);
        return *word_;
    }

  private:
    volatile uint64_t* word_;
    const char* what_;
    cudaStream_t stream_;
};

// One value from the device. Waits for the stream: where it is used is where the CPU stops for the GPU.
template <class T>
T read_back(const T* on_device, const char* what, const OnDeviceOf& device) {
    T value;
    check_cuda(cudaMemcpyAsync(&value, on_device, sizeof(T), cudaMemcpyDeviceToHost, device.stream()), what);
    check_cuda(cudaStreamSynchronize(device.stream()), what);
    return value;
}

inline void fill_zero(void* on_device, size_t bytes, const char* what, const OnDeviceOf& device) {
    check_cuda(cudaMemsetAsync(on_device, 0, bytes, device.stream()), what);
}

}  // namespace engine::cuda
