// Memory that a call works in.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

#include "common/round.h"

namespace engine {

// 64-byte aligned memory for one call. Kept by its thread up to `kKept` bytes, so that calls neither allocate nor fault
// pages in; the heap's beyond. `Tag` tells apart scratches that one thread uses at the same time.
template <class Tag, int64_t kKept = 1 << 20>
class Scratch {
  public:
    explicit Scratch(int64_t bytes) {
        if (bytes > kKept) {
            own_.reset(allocate(bytes));
            memory_ = own_.get();
            return;
        }
        thread_local Kept kept;
        if (kept.size < bytes) {
            kept.memory.reset();
            kept.size = 0;
            kept.memory.reset(allocate(bytes));
            kept.size = bytes;
        }
        memory_ = kept.memory.get();
    }
    // `count` elements, 64-byte aligned, after what was taken before.
    template <class T>
    T* take(int64_t count) {
        T* taken = reinterpret_cast<T*>(memory_ + used_);
        used_ += bytes_for<T>(count);
        return taken;
    }
    // What take<T>(count) uses.
    template <class T>
    static int64_t bytes_for(int64_t count) {
        return round_up(count * static_cast<int64_t>(sizeof(T)), 64);
    }

  private:
    struct Free {
        void operator()(char* memory) const { std::free(memory); }
    };
    struct Kept {
        std::unique_ptr<char, Free> memory;
        int64_t size = 0;
    };
    static char* allocate(int64_t bytes) {
        void* memory = std::aligned_alloc(64, round_up(bytes, 64));
        if (memory == nullptr) throw std::bad_alloc();
        return static_cast<char*>(memory);
    }

    std::unique_ptr<char, Free> own_;
    char* memory_ = nullptr;
    int64_t used_ = 0;
};

}  // namespace engine
