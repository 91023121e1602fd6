// What csrc/cuda/tma.cuh needs: barriers in shared memory, and copies of tiles that are made some time later, in any
// order, while some thread waits.
#pragma once

#include "cuda/fibers.h"

namespace emulated {

struct Barrier {
    int32_t expected, pending, bytes;
    uint32_t phase;
};

inline std::vector<std::function<void()>> transfers;  // begun and not made, of all blocks

inline void end_phase(Barrier& barrier) {
    if (barrier.pending != 0 || barrier.bytes != 0) return;
    barrier.phase ^= 1;
    barrier.pending = barrier.expected;
}
inline void barrier_init(Barrier& barrier, int arrivals) { barrier = {arrivals, arrivals, 0, 0}; }
inline void barrier_arrive(Barrier& barrier) {
    if (--barrier.pending < 0) stop("more arrivals at a barrier than it has");
    end_phase(barrier);
}
inline void barrier_arrive_and_expect(Barrier& barrier, int bytes) {
    barrier.bytes += bytes;
    barrier_arrive(barrier);
}
inline void barrier_arrive_after_copies(Barrier& barrier) {
    std::vector<std::vector<Copy>> begun(1);
    begun.swap(fiber().copies);
    transfers.push_back([&barrier, all = std::move(begun)] {
        for (const auto& group : all)
            for (const Copy& copy : group) std::memcpy(copy.to, copy.from, copy.bytes);
        barrier_arrive(barrier);
    });
}
inline void barrier_wait(Barrier& barrier, uint32_t parity) {
    while (barrier.phase == parity) {
        if (!transfers.empty() && random() % 4 == 0) {
            std::swap(transfers[random() % transfers.size()], transfers.back());
            const auto transfer = std::move(transfers.back());
            transfers.pop_back();
            transfer();
        }
        yield();
    }
}

inline void copy_bytes(void* to_shared, const void* from, int bytes, Barrier& barrier) {
    if (shared_address(to_shared) % 16 || reinterpret_cast<uintptr_t>(from) % 16 || bytes % 16)
        stop("cp.async.bulk: not aligned to 16 bytes");
    transfers.push_back([=, &barrier] {
        std::memcpy(to_shared, from, static_cast<size_t>(bytes));
        barrier.bytes -= bytes;
        end_phase(barrier);
    });
}

struct TileMap {
    const char* data;
    int64_t rows, row_bytes, stride;
    int tile_rows, tile_bytes;
};
inline TileMap tile_map(const void* data, int64_t rows, int64_t row_bytes, int64_t stride, int tile_rows,
                        int tile_bytes, const char*) {
    if (reinterpret_cast<uintptr_t>(data) % 16 || stride % 16 || rows < 1 || row_bytes < 1 || tile_rows > 256 ||
        (tile_bytes != 64 && tile_bytes != 128))
        stop("a tensor map that the driver would refuse");
    return {static_cast<const char*>(data), rows, row_bytes, stride, tile_rows, tile_bytes};
}
inline void copy_tile(void* to_shared, const TileMap& map, int byte, int row, Barrier& barrier) {
    if (shared_address(to_shared) % 1024) stop("a tile that does not begin on 1024 bytes");
    auto* to = static_cast<char*>(to_shared);
    transfers.push_back([=, &barrier] {
        for (int i = 0; i < map.tile_rows * map.tile_bytes; ++i) {
            const int64_t at_row = row + i / map.tile_bytes, at = byte + i % map.tile_bytes;
            const bool inside = at_row >= 0 && at_row < map.rows && at >= 0 && at < map.row_bytes;
            to[i ^ (i >> 7 & (map.tile_bytes / 16 - 1)) << 4] = inside ? map.data[at_row * map.stride + at] : char{0};
        }
        barrier.bytes -= map.tile_rows * map.tile_bytes;
        end_phase(barrier);
    });
}

}  // namespace emulated
