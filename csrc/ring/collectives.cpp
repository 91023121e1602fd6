// The collectives, each cut into steps and stages; how ranks wait for one another stands in shared_memory.cpp.

#include <algorithm>
#include <cstring>

#include "ring/segment.h"

namespace engine::ring {
namespace {

constexpr size_t kOneStageBytes = 16 << 10;  // up to here one exchange is faster than moving less
constexpr size_t kLine = 64;                 // slices are whole cache lines, so that no two ranks write the same

size_t divide_up(size_t a, size_t b) { return (a + b - 1) / b; }

}  // namespace

void SharedMemory::dispatch(const Call& call, const char* in, char* out, Wait& wait) {
    if (call.compare) return compare(wait);
    switch (call.kind) {
        case Kind::reduce_scatter:
            return reduce_scatter(in, out, call, wait);
        case Kind::all_gather:
            return all_gather(in, out, call, wait);
        case Kind::all_reduce:
            if (call.numel * element_size(call.dtype) <= kOneStageBytes) return one_stage(out, call, wait);
            return all_reduce(out, call, wait);
    }
}

// Into the own segment.
void SharedMemory::write(char* to, const char* from, size_t bytes) const {
    streams_ ? stream(to, from, bytes) : static_cast<void>(std::memcpy(to, from, bytes));
}

// Runs the stages one step apart.
void SharedMemory::pipeline(size_t steps, const Stages& stages, Wait& wait) {
    const uint32_t first = step_;
    step_ += static_cast<uint32_t>(steps);
    const size_t reducing = stages.reduce ? 1 : 0, delay = reducing + (stages.collect ? 1 : 0);
    for (size_t i = 0; i < steps + delay; ++i) {
        if (i < steps) {
            stages.publish(i, first + i);
            advance(header(rank_).published, first + i + 1);
            if (i == 0) compare_headers(wait);
        }
        if (reducing && i >= 1 && i - 1 < steps) {
            for (int rank = 0; rank < world_size_; ++rank)
                if (rank != rank_) await(rank, false, first + i, wait);
            stages.reduce(i - 1, first + i - 1);
            advance(header(rank_).reduced, first + i);
        }
        if (stages.collect && i >= delay) {
            const size_t at = i - delay;
            for (int turn = 1; turn < world_size_; ++turn) {
                const int peer = (rank_ + turn) % world_size_;
                await(peer, reducing, first + at + 1, wait);
                stages.collect(at, first + at, peer);
            }
        }
    }
    if (!reducing) header(rank_).reduced.steps.store(step_);  // nobody waits for it
}

void SharedMemory::compare(Wait& wait) {
    header(rank_).reduced.steps.store(++step_);  // nobody waits for it
    advance(header(rank_).published, step_);
    compare_headers(wait);
}

void SharedMemory::one_stage(char* data, const Call& call, Wait& wait) {
    const size_t bytes = call.numel * element_size(call.dtype);
    const uint32_t step = step_;
    if (bytes) std::memcpy(input(rank_, step), data, bytes);
    compare(wait);
    for (int rank = 0; rank < world_size_; ++rank) sources_[rank] = input(rank, step);
    reduce(sources_.data(), world_size_, call.numel, data, nullptr, call.dtype, call.op);
}

void SharedMemory::publish_slices(const char* in, const SliceOf& slice, size_t i, uint32_t step) {
    for (int peer = 0; peer < world_size_; ++peer) {
        const Slice part = slice(i, peer);
        if (peer != rank_ && part.bytes) write(input(rank_, step) + part.slot, in + part.offset, part.bytes);
    }
}

// Into `result`, which may be this rank's own part of `in`, and into `copy` where it isn't null.
void SharedMemory::reduce_slice(const char* in, const Slice& own, uint32_t step, char* result, char* copy,
                                const Call& call) {
    for (int rank = 0; rank < world_size_; ++rank)
        sources_[rank] = rank == rank_ ? in + own.offset : input(rank, step) + own.slot;
    reduce(sources_.data(), world_size_, own.bytes / element_size(call.dtype), result, copy, call.dtype, call.op);
}

void SharedMemory::all_reduce(char* data, const Call& call, Wait& wait) {
    const size_t bytes = call.numel * element_size(call.dtype);
    const SliceOf slice = [&](size_t i, int rank) {
        const size_t all = std::min(kChunk, bytes - i * kChunk), each = divide_up(all, world_size_ * kLine) * kLine;
        const size_t offset = std::min(all, rank * each);
        return Slice{i * kChunk + offset, offset, std::min(each, all - offset)};
    };
    Stages stages;
    stages.publish = [&](size_t i, uint32_t step) { publish_slices(data, slice, i, step); };
    stages.reduce = [&](size_t i, uint32_t step) {
        const Slice own = slice(i, rank_);
        reduce_slice(data, own, step, data + own.offset, streams_ ? nullptr : output(rank_, step), call);
        if (streams_) stream(output(rank_, step), data + own.offset, own.bytes);
    };
    stages.collect = [&](size_t i, uint32_t step, int peer) {
        const Slice part = slice(i, peer);
        if (part.bytes) std::memcpy(data + part.offset, output(peer, step), part.bytes);
    };
    pipeline(divide_up(bytes, kChunk), stages, wait);
    const std::chrono::duration<double> took = Clock::now() - wait.together;
    if (rank_ == 0) pace_.took(Pace::size_class(bytes), streams_, took.count());
}

void SharedMemory::reduce_scatter(const char* in, char* out, const Call& call, Wait& wait) {
    const size_t bytes = call.numel * element_size(call.dtype), each = kChunk / world_size_ / kLine * kLine;
    const SliceOf slice = [&](size_t i, int rank) {
        return Slice{rank * bytes + i * each, rank * each, std::min(each, bytes - i * each)};
    };
    Stages stages;
    stages.publish = [&](size_t i, uint32_t step) { publish_slices(in, slice, i, step); };
    stages.reduce = [&](size_t i, uint32_t step) {
        reduce_slice(in, slice(i, rank_), step, out + i * each, nullptr, call);
    };
    pipeline(std::max<size_t>(1, divide_up(bytes, each)), stages, wait);
}

void SharedMemory::all_gather(const char* in, char* out, const Call& call, Wait& wait) {
    const size_t bytes = call.numel * element_size(call.dtype);
    const auto part = [&](size_t i) { return std::min(kChunk, bytes - i * kChunk); };
    Stages stages;
    stages.publish = [&](size_t i, uint32_t step) {
        if (part(i)) write(input(rank_, step), in + i * kChunk, part(i));
    };
    stages.collect = [&](size_t i, uint32_t step, int peer) {
        if (part(i)) std::memcpy(out + peer * bytes + i * kChunk, input(peer, step), part(i));
    };
    pipeline(std::max<size_t>(1, divide_up(bytes, kChunk)), stages, wait);
    if (bytes && in != out + rank_ * bytes) std::memcpy(out + rank_ * bytes, in, bytes);
}

}  // namespace engine::ring
