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
// The same of more than 48 KB, by kernels that launch_with_shared starts; at most one, and on 1024 bytes.
#define ENGINE_DYNAMIC_SHARED(name, ...)                                     \
    extern __shared__ __align__(1024) unsigned char engine_dynamic_shared[]; \
    auto& name = *reinterpret_cast<std::type_identity_t<__VA_ARGS__>*>(engine_dynamic_shared)

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
    // wgmma is of compute capability 9.0 alone, where the library has code for sm_90a.
    bool has_wgmma() const {
        int major = 0, minor = 0;
        check_cuda(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index_), "engine: capability");
        check_cuda(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, index_), "engine: capability");
        return major == 9 && minor == 0;
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

// The same with `shared` bytes for ENGINE_DYNAMIC_SHARED, and in clusters of `cluster` blocks (from sm_90 on).
template <class... Parameters, class... Args>
void launch_clusters(void (*kernel)(Parameters...), const char* what, int64_t blocks, int threads, int cluster,
                     int shared, const OnDeviceOf& device, Args... args) {
    if (blocks == 0) return;
    STD_TORCH_CHECK(blocks <= 0x7fffffff, what, ": more blocks than a launch can have");
    check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared), what);
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(blocks));
    config.blockDim = dim3(static_cast<unsigned>(threads));
    config.dynamicSmemBytes = static_cast<size_t>(shared);
    config.stream = device.stream();
    config.attrs = &attribute;
    config.numAttrs = cluster > 1 ? 1 : 0;
    check_cuda(cudaLaunchKernelEx(&config, kernel, args...), what);
}
template <class... Parameters, class... Args>
void launch_with_shared(void (*kernel)(Parameters...), const char* what, int64_t blocks, int threads, int shared,
                        const OnDeviceOf& device, Args... args) {
    launch_clusters(kernel, what, blocks, threads, 1, shared, device, args...);
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
