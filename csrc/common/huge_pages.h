// Large outputs in huge pages. What malloc maps anew for each call (from 32 MB on, and the first time below) is faulted
// in page by page as it is first written, at 4 KB each, and that costs two to four times the writing itself. NumPy asks
// for huge pages by default too, for the same reason.
#pragma once

#include <sys/mman.h>

#include <cstdint>

#include "common/tensor.h"

namespace engine {

// Asks the kernel to back the memory by huge pages, from 4 MB on. A hint: where it is refused nothing changes.
inline void advise_huge_pages(void* memory, int64_t bytes) {
    constexpr uintptr_t kHuge = 2 << 20;
    if (bytes < static_cast<int64_t>(2 * kHuge)) return;
    const uintptr_t begin = (reinterpret_cast<uintptr_t>(memory) + kHuge - 1) & ~(kHuge - 1);
    const uintptr_t end = (reinterpret_cast<uintptr_t>(memory) + static_cast<uintptr_t>(bytes)) & ~(kHuge - 1);
    if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
}

// A new tensor for a kernel that writes all of it: every result that grows with the call's arguments. Below 4 MB it is
// new_tensor.
inline Tensor new_output(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType dtype) {
    Tensor t = new_tensor(like, sizes, dtype);
    advise_huge_pages(t.mutable_data_ptr(), t.numel() * static_cast<int64_t>(t.element_size()));
    return t;
}

}  // namespace engine
