// How a CUDA kernel is started from libtorch's stable ABI: on torch's current stream, with errors raised by name.
// tests/cuda/emulated/cuda/launch.h stands in for this file where kernels run on the CPU.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>

#include "common/tensor.h"

// Declared by shim.h only where torch itself was built with CUDA.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);

namespace engine {

inline void check_cuda(cudaError_t error, const char* what) {
    STD_TORCH_CHECK(error == cudaSuccess, what, ": ", cudaGetErrorString(error));
}

// Makes the tensor's device current while it lives, and gives torch's current stream on it.
class OnDeviceOf {
  public:
    explicit OnDeviceOf(const Tensor& t) : guard_(t.get_device_index()) {
        void* stream = nullptr;
        STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream) == AOTI_TORCH_SUCCESS,
                        "engine: torch gives no CUDA stream");
        stream_ = static_cast<cudaStream_t>(stream);
    }
    cudaStream_t stream() const { return stream_; }

  private:
    torch::stable::accelerator::DeviceGuard guard_;
    cudaStream_t stream_;
};

// kernel<<<blocks, threads>>>(args...), where there is anything to do.
template <class... Parameters, class... Args>
void launch(void (*kernel)(Parameters...), const char* what, int64_t blocks, int threads, const OnDeviceOf& device,
            Args... args) {
    if (blocks == 0) return;
    kernel<<<static_cast<unsigned>(blocks), threads, 0, device.stream()>>>(args...);
    check_cuda(cudaGetLastError(), what);
}

// One value from the device. Waits for the stream: where it is used is where the CPU stops for the GPU.
template <class T>
T read_back(const T* on_device, const char* what, const OnDeviceOf& device) {
    T value;
    check_cuda(cudaMemcpyAsync(&value, on_device, sizeof(T), cudaMemcpyDeviceToHost, device.stream()), what);
    check_cuda(cudaStreamSynchronize(device.stream()), what);
    return value;
}

}  // namespace engine
