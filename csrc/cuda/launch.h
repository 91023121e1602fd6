// How a CUDA kernel is started from libtorch's stable ABI: on torch's current stream, with errors raised by name.
// tests/cuda/emulated/cuda/launch.h stands in for this file where kernels run on the CPU.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>

#include <type_traits>

#include "common/tensor.h"

// Declared by shim.h only where torch itself was built with CUDA.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);

// Shared memory of a block, of the type given last.
#define ENGINE_SHARED(name, ...) __shared__ std::type_identity_t<__VA_ARGS__> name

// The same, of a size that launch_dependent is told: more than 48 KB are to be had only so. One for a kernel.
#define ENGINE_DYNAMIC_SHARED(name, ...)             \
    extern __shared__ uint4 engine_dynamic_shared[]; \
    std::type_identity_t<__VA_ARGS__>& name =        \
        *reinterpret_cast<std::type_identity_t<__VA_ARGS__>*>(engine_dynamic_shared)

namespace engine {

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

// The same, with `shared` bytes of ENGINE_DYNAMIC_SHARED, after a kernel whose blocks call allow_next_kernel: this one
// may begin before that one has ended, and calls wait_for_previous_kernel before it reads what that one writes
// (ptx.cuh).
template <class... Parameters, class... Args>
void launch_dependent(void (*kernel)(Parameters...), const char* what, int64_t blocks, int threads, int shared,
                      const OnDeviceOf& device, Args... args) {
    if (blocks == 0) return;
    STD_TORCH_CHECK(blocks <= 0x7fffffff, what, ": more blocks than a launch can have");
    if (shared > 48 << 10)
        check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared), what);
    cudaLaunchAttribute overlap{};
    overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    overlap.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(blocks));
    config.blockDim = dim3(static_cast<unsigned>(threads));
    config.dynamicSmemBytes = static_cast<size_t>(shared);
    config.stream = device.stream();
    config.attrs = &overlap;
    config.numAttrs = device.overlaps_kernels() ? 1 : 0;
    check_cuda(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(args)...), what);
}

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

}  // namespace engine
