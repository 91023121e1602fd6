#include "ring/shared_memory.h"

#include <fcntl.h>
#include <linux/futex.h>
#include <poll.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstring>

#include "common/isa.h"

namespace engine::ring {

using Clock = std::chrono::steady_clock;

// Progress of one rank, on a cache line of its own.
struct alignas(64) Counter {
    std::atomic<uint32_t> steps;
    std::atomic<uint32_t> sleepers;  // how many wait on `steps` in the kernel: nobody needs waking at 0
};

// What a rank was called with. Four are kept: a rank that begins operation n knows that all have read its n - 2.
struct Operation {
    uint64_t number, numel;
    Dtype dtype;
    Op op;
};

struct Header {
    char token[64];
    Counter published, reduced;
    Operation operations[4];
    std::atomic<uint32_t> failed;  // `error` is there to read
    char error[512];
};

namespace {

constexpr size_t kHeaderBytes = 4096;
constexpr size_t kSegmentBytes = kHeaderBytes + 2 * SharedMemory::kSlots * SharedMemory::kChunk;
constexpr size_t kOneStageBytes = 16 << 10;     // up to here one exchange is faster than moving less
constexpr long kSleepNanoseconds = 50'000'000;  // how often a sleeper looks whether its peers are alive
constexpr std::chrono::seconds kWarnAfter{10};
static_assert(sizeof(Header) <= kHeaderBytes && kSegmentBytes < (8 << 20));

[[noreturn]] void refuse(const std::string& what, int error) {
    throw std::runtime_error(what + ": " + std::strerror(error));
}

char* map_segment(int descriptor) {
    void* at = mmap(nullptr, kSegmentBytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, descriptor, 0);
    if (at == MAP_FAILED) refuse("cannot map a shared segment", errno);
    return static_cast<char*>(at);
}

void advance(Counter& counter, uint32_t steps) {
    counter.steps.store(steps);
    if (counter.sleepers.load()) syscall(SYS_futex, &counter.steps, FUTEX_WAKE, INT32_MAX, nullptr, nullptr, 0);
}

bool reached(const Counter& counter, uint32_t steps) {  // by their difference, because counters wrap around
    return static_cast<int32_t>(counter.steps.load(std::memory_order_acquire) - steps) >= 0;
}

void sleep_on(Counter& counter, uint32_t steps) {
    const timespec time{0, kSleepNanoseconds};
    counter.sleepers.fetch_add(1);
    const uint32_t seen = counter.steps.load();
    if (static_cast<int32_t>(seen - steps) < 0) syscall(SYS_futex, &counter.steps, FUTEX_WAIT, seen, &time, nullptr, 0);
    counter.sleepers.fetch_sub(1);
}

void relax() {
#if ENGINE_X86
    __builtin_ia32_pause();
#endif
}

}  // namespace

struct SharedMemory::Wait {
    double seconds;
    Clock::time_point begun;
    const std::function<void(const std::string&)>& poll;
    bool warned = false;
};

SharedMemory::SharedMemory(int rank, int world_size, const std::string& token)
    : rank_(rank), world_size_(world_size), peers_(world_size) {
    if (rank < 0 || rank >= world_size) throw std::invalid_argument("rank outside the group");
    if (token.size() >= sizeof(Header::token)) throw std::invalid_argument("token too long");
    descriptor_ = memfd_create("engine-all-reduce", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    if (descriptor_ < 0) refuse("cannot create a shared segment", errno);
    try {
        // Reserved here, so that a full memory is an error now and no SIGBUS later; sealed, so that it stays so.
        int error = EINTR;
        while (error == EINTR) error = posix_fallocate(descriptor_, 0, kSegmentBytes);
        if (error) refuse("cannot reserve shared memory", error);
        if (fcntl(descriptor_, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW)) refuse("cannot seal shared memory", errno);
        peers_[rank].segment = map_segment(descriptor_);
    } catch (...) {
        close_descriptor();
        throw;
    }
    std::memcpy(header(rank).token, token.c_str(), token.size() + 1);
    cpu_set_t cores;
    const bool known = sched_getaffinity(0, sizeof(cores), &cores) == 0;
    patience_ = known && CPU_COUNT(&cores) >= world_size ? 200 : 10;
}

SharedMemory::~SharedMemory() {
    if (world_size_ > 1) fail("rank " + std::to_string(rank_) + " has left the group");
    for (Peer& peer : peers_) {
        if (peer.segment) munmap(peer.segment, kSegmentBytes);
        if (peer.alive >= 0) close(peer.alive);
    }
    close_descriptor();
}

void SharedMemory::close_descriptor() {
    if (descriptor_ >= 0) close(descriptor_);
    descriptor_ = -1;
}

void SharedMemory::open_peer(int rank, int pid, int descriptor, const std::string& token, const std::string& host) {
    if (rank < 0 || rank >= world_size_ || peers_[rank].segment) throw std::invalid_argument("no such peer to open");
    Peer& peer = peers_[rank];
    peer.alive = static_cast<int>(syscall(SYS_pidfd_open, pid, 0));
    if (peer.alive < 0) refuse("cannot watch process " + std::to_string(pid), errno);
    const std::string path = "/proc/" + std::to_string(pid) + "/fd/" + std::to_string(descriptor);
    const int opened = open(path.c_str(), O_RDWR | O_CLOEXEC | O_NONBLOCK | O_NOCTTY);
    if (opened < 0) refuse("cannot open " + path, errno);
    struct stat status;
    // Looked at before it is mapped: another process's file may be shorter, or shrink.
    const bool ours = fstat(opened, &status) == 0 && static_cast<size_t>(status.st_size) == kSegmentBytes &&
                      (fcntl(opened, F_GET_SEALS) & F_SEAL_SHRINK) > 0;
    try {
        if (!ours) throw std::runtime_error(path + " is another file");
        peer.segment = map_segment(opened);
    } catch (...) {
        close(opened);
        throw;
    }
    close(opened);
    if (std::strncmp(header(rank).token, token.c_str(), sizeof(Header::token)) != 0)
        throw std::runtime_error(path + " is another segment");
    peer.host = host;
}

Header& SharedMemory::header(int rank) const { return *reinterpret_cast<Header*>(peers_[rank].segment); }

char* SharedMemory::input(int rank, uint32_t step) const {
    return peers_[rank].segment + kHeaderBytes + (step % kSlots) * kChunk;
}

char* SharedMemory::output(int rank, uint32_t step) const { return input(rank, step) + kSlots * kChunk; }

void SharedMemory::fail(const std::string& text) {
    if (error_.empty()) error_ = text;
    Header& own = header(rank_);
    if (own.failed.load()) return;
    const size_t length = std::min(error_.size(), sizeof(own.error) - 1);
    std::memcpy(own.error, error_.data(), length);
    own.error[length] = 0;
    own.failed.store(1);
    for (Counter* counter : {&own.published, &own.reduced}) advance(*counter, counter->steps.load());
}

void SharedMemory::all_reduce(void* data, size_t numel, Dtype dtype, Op op, double timeout_seconds,
                              const std::function<void(const std::string&)>& poll) {
    std::lock_guard lock(mutex_);
    if (!error_.empty()) throw PeerFailure("this group failed before: " + error_);
    for (const Peer& peer : peers_)
        if (!peer.segment) throw std::runtime_error("not every peer's segment is open");
    Wait wait{timeout_seconds, {}, poll};
    try {
        run(static_cast<char*>(data), numel, dtype, op, wait);
    } catch (const PeerFailure& failure) {
        fail(failure.what());
        throw;
    } catch (...) {
        fail("rank " + std::to_string(rank_) + " was interrupted in operation " + std::to_string(number_));
        throw;
    }
}

void SharedMemory::run(char* data, size_t numel, Dtype dtype, Op op, Wait& wait) {
    ++number_;
    header(rank_).operations[number_ % 4] = {number_, numel, dtype, op};
    if (numel * element_size(dtype) <= kOneStageBytes)
        one_stage(data, numel, dtype, op, wait);
    else
        three_stages(data, numel, dtype, op, wait);
}

void SharedMemory::one_stage(char* data, size_t numel, Dtype dtype, Op op, Wait& wait) {
    const size_t bytes = numel * element_size(dtype);
    const uint32_t step = step_++;
    if (bytes) std::memcpy(input(rank_, step), data, bytes);
    header(rank_).reduced.steps.store(step_);  // nobody waits for it
    advance(header(rank_).published, step_);
    compare_headers(wait);
    std::vector<const void*> sources(world_size_);
    for (int rank = 0; rank < world_size_; ++rank) sources[rank] = input(rank, step);
    reduce(sources.data(), world_size_, numel, data, nullptr, dtype, op);
}

void SharedMemory::three_stages(char* data, size_t numel, Dtype dtype, Op op, Wait& wait) {
    const size_t size = element_size(dtype), bytes = numel * size;
    const size_t steps = (bytes + kChunk - 1) / kChunk;
    const uint32_t first = step_;
    step_ += static_cast<uint32_t>(steps);
    struct Slice {
        size_t offset, bytes;  // in the chunk
    };
    const auto chunk_bytes = [&](size_t i) { return std::min(kChunk, bytes - i * kChunk); };
    const auto slice = [&](size_t i, int rank) {  // whole cache lines, so that no two ranks write the same
        const size_t all = chunk_bytes(i), each = ((all + world_size_ - 1) / world_size_ + 63) / 64 * 64;
        const size_t offset = std::min(all, rank * each);
        return Slice{offset, std::min(each, all - offset)};
    };
    std::vector<const void*> sources(world_size_);
    for (size_t i = 0; i < steps + 2; ++i) {
        if (i < steps) {  // publish
            for (int peer = 0; peer < world_size_; ++peer) {
                const Slice part = slice(i, peer);
                if (peer == rank_ || !part.bytes) continue;
                std::memcpy(input(rank_, first + i) + part.offset, data + i * kChunk + part.offset, part.bytes);
            }
            advance(header(rank_).published, first + i + 1);
            if (i == 0) compare_headers(wait);
        }
        if (i >= 1 && i - 1 < steps) {  // reduce
            const size_t at = i - 1;
            const Slice own = slice(at, rank_);
            char* mine = data + at * kChunk + own.offset;
            for (int rank = 0; rank < world_size_; ++rank) {
                if (rank != rank_) await(rank, false, first + at + 1, wait);
                sources[rank] = rank == rank_ ? mine : input(rank, first + at) + own.offset;
            }
            reduce(sources.data(), world_size_, own.bytes / size, mine, output(rank_, first + at), dtype, op);
            advance(header(rank_).reduced, first + at + 1);
        }
        if (i >= 2) {  // collect
            const size_t at = i - 2;
            for (int turn = 1; turn < world_size_; ++turn) {
                const int peer = (rank_ + turn) % world_size_;
                const Slice part = slice(at, peer);
                await(peer, true, first + at + 1, wait);
                if (part.bytes) std::memcpy(data + at * kChunk + part.offset, output(peer, first + at), part.bytes);
            }
        }
    }
}

// Waits until every rank has begun this operation, and throws unless all were called with the same. Every rank compares
// itself with all others, and no rank goes on before: where two differ, all of them find a difference.
void SharedMemory::compare_headers(Wait& wait) {
    const Operation& own = header(rank_).operations[number_ % 4];
    const uint32_t first = header(rank_).published.steps.load(std::memory_order_relaxed);
    for (int rank = 0; rank < world_size_; ++rank)
        if (rank != rank_) await(rank, false, first, wait);
    for (int rank = 0; rank < world_size_; ++rank) {
        const Operation& other = header(rank).operations[number_ % 4];
        if (other.number == own.number && other.numel == own.numel && other.dtype == own.dtype && other.op == own.op)
            continue;
        static const char* const kDtypes[] = {"float32", "float64", "float16", "bfloat16", "int32", "int64"};
        static const char* const kOps[] = {"sum", "avg", "max", "min"};
        const auto words = [](const Operation& o) {
            return std::string(kOps[static_cast<int>(o.op) & 3]) + " of " + std::to_string(o.numel) + " " +
                   kDtypes[std::min(static_cast<unsigned>(o.dtype), 5u)];
        };
        throw PeerFailure("operation " + std::to_string(number_) + ": rank " + std::to_string(rank) + " on " +
                          peers_[rank].host + " called " + words(other) + ", rank " + std::to_string(rank_) + " " +
                          words(own));
    }
}

// Waits until `rank` has published (or reduced) so many steps.
void SharedMemory::await(int rank, bool reduced, uint32_t steps, Wait& wait) {
    Counter& counter = reduced ? header(rank).reduced : header(rank).published;
    // Yielding between looks costs little on a core of one's own, and gives it to the peer where both are on the same.
    for (int i = 0; i < patience_; ++i) {
        for (int j = 0; j < 32; ++j) {
            if (reached(counter, steps)) return;
            relax();
        }
        sched_yield();
    }
    wait.begun = Clock::now();  // of this wait: a large tensor may take longer than the timeout as long as it moves
    while (!reached(counter, steps)) {
        sleep_on(counter, steps);
        if (reached(counter, steps)) return;
        const std::string text = trouble(wait);
        // A peer may have finished, and ended, between the two looks.
        if (reached(counter, steps)) return;
        if (!text.empty()) throw PeerFailure(text);
        const bool warn = !wait.warned && Clock::now() - wait.begun >= kWarnAfter;
        wait.warned |= warn;
        wait.poll(warn ? "operation " + std::to_string(number_) + " has waited 10 s for rank " + std::to_string(rank) +
                             " on " + peers_[rank].host
                       : std::string());
    }
}

// What is wrong with the peers; empty where they only take long.
std::string SharedMemory::trouble(Wait& wait) {
    const std::string operation = " in operation " + std::to_string(number_);
    const auto name = [&](int rank) { return "rank " + std::to_string(rank) + " on " + peers_[rank].host; };
    for (int rank = 0; rank < world_size_; ++rank) {
        pollfd alive{peers_[rank].alive, POLLIN, 0};
        if (rank != rank_ && poll(&alive, 1, 0) > 0) return name(rank) + " died" + operation;
    }
    for (int rank = 0; rank < world_size_; ++rank)
        if (rank != rank_ && header(rank).failed.load()) return std::string(header(rank).error);
    if (Clock::now() - wait.begun < std::chrono::duration<double>(wait.seconds)) return "";
    // Everybody waits for the one that is furthest behind.
    const auto progress = [&](int rank) {
        const Header& its = header(rank);
        return static_cast<int64_t>(static_cast<int32_t>(its.published.steps.load() - step_)) +
               static_cast<int32_t>(its.reduced.steps.load() - step_);
    };
    int last = rank_ == 0 ? 1 : 0;
    for (int rank = 0; rank < world_size_; ++rank)
        if (rank != rank_ && progress(rank) < progress(last)) last = rank;
    return name(last) + " did not answer within " + std::to_string(wait.seconds) + " s" + operation;
}

}  // namespace engine::ring
