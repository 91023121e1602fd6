// The part of cuda_fp16.h that the kernels use, for a build without CUDA.
#pragma once

#include "common/dtype.h"

inline engine::Half __ushort_as_half(unsigned short bits) { return {bits}; }
inline float __half2float(engine::Half h) { return engine::to_float(h); }
