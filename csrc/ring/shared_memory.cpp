#include "ring/shared_memory.h"

#include <fcntl.h>
#include <poll.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/stat.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <utility>

#include "ring/segment.h"

namespace engine::ring {
namespace {

constexpr std::chrono::seconds kWarnAfter{10};
// How often a waiting rank yields before it sleeps on the futex; only kUnevenPatience times where ranks crowd some cores
// and other processes compete, as the kernel wakes a sleeper on an idle core.
constexpr int kPatience = 200, kUnevenPatience = 3;
// How often a rank looks before it first yields, where no other rank is on its core: whoever else is there may keep it.
constexpr int kLooks = 64;
constexpr size_t kCores = CPU_SETSIZE;  // that ranks are counted by
// How often, while the ranks are badly spread, it is looked at whether one of them may move to another core.
constexpr std::chrono::milliseconds kSpreadEvery{1};

int usable_cores() {
    cpu_set_t set;
    return sched_getaffinity(0, sizeof(set), &set) == 0 ? CPU_COUNT(&set) : 1;
}

// Whether more threads want to run on this machine than `most`, or it can't be known.
bool crowded(int most) {
    const int file = open("/proc/loadavg", O_RDONLY | O_CLOEXEC);
    if (file < 0) return true;
    char text[128];
    const ssize_t length = read(file, text, sizeof(text) - 1);
    close(file);
    int running = 0;
    text[std::max<ssize_t>(length, 0)] = 0;
    return std::sscanf(text, "%*s %*s %*s %d/", &running) != 1 || running < 1 || running > most;
}

// Closes a file descriptor unless it is released.
class Descriptor {
  public:
    explicit Descriptor(int number) : number_(number) {}
    Descriptor(const Descriptor&) = delete;
    Descriptor& operator=(const Descriptor&) = delete;
    ~Descriptor() {
        if (number_ >= 0) close(number_);
    }
    int get() const { return number_; }
    int release() { return std::exchange(number_, -1); }

  private:
    int number_;
};

[[noreturn]] void refuse(const std::string& what, int error) {
    throw std::runtime_error(what + ": " + std::strerror(error));
}

char* map_segment(int descriptor) {
    void* at = mmap(nullptr, kSegmentBytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, descriptor, 0);
    if (at == MAP_FAILED) refuse("cannot map a shared segment", errno);
    return static_cast<char*>(at);
}

std::string words(const Call& call) {
    static const char* const kKinds[] = {"all_reduce", "reduce_scatter", "all_gather"};
    static const char* const kDtypes[] = {"float32", "float64", "float16", "bfloat16", "int32", "int64"};
    static const char* const kOps[] = {"sum", "avg", "max", "min"};
    static const char* const kCodecs[] = {"", " by bf16", " by int8", " by bitmap"};
    const auto pick = [](const auto& names, auto i) {  // what a peer wrote is looked up within bounds
        return std::string(names[std::min(static_cast<size_t>(static_cast<unsigned>(i)), std::size(names) - 1)]);
    };
    std::string text = pick(kKinds, call.kind) + " (";
    if (call.kind != Kind::all_gather) text += pick(kOps, call.op) + " of ";
    text += std::to_string(call.numel) + " " + pick(kDtypes, call.dtype) + pick(kCodecs, call.codec);
    if (call.codec == Codec::bitmap) text += " with density " + std::to_string(call.density);
    return text + ")";
}

}  // namespace

SharedMemory::SharedMemory(int rank, int world_size, const std::string& token)
    : rank_(rank), world_size_(world_size), peers_(world_size), sources_(world_size) {
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
    process_ = getpid();
    cores_ = usable_cores();
    std::memcpy(header(rank).token, token.c_str(), token.size() + 1);
}

SharedMemory::~SharedMemory() {
    // A forked child says nothing, and may have inherited a lock that another thread held.
    if (world_size_ > 1 && getpid() == process_) fail("rank " + std::to_string(rank_) + " has left the group");
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
    Descriptor alive(static_cast<int>(syscall(SYS_pidfd_open, pid, 0)));
    if (alive.get() < 0) refuse("cannot watch process " + std::to_string(pid), errno);
    const std::string path = "/proc/" + std::to_string(pid) + "/fd/" + std::to_string(descriptor);
    const Descriptor opened(open(path.c_str(), O_RDWR | O_CLOEXEC | O_NONBLOCK | O_NOCTTY));
    if (opened.get() < 0) refuse("cannot open " + path, errno);
    struct stat status;
    // Looked at before it is mapped: another process's file may be shorter, or shrink.
    const int seals = fcntl(opened.get(), F_GET_SEALS);  // -1 where it isn't of this kind
    if (seals < 0 || !(seals & F_SEAL_SHRINK) || fstat(opened.get(), &status) ||
        static_cast<size_t>(status.st_size) != kSegmentBytes)
        throw std::runtime_error(path + " is another file");
    char* segment = map_segment(opened.get());
    if (std::strncmp(reinterpret_cast<Header*>(segment)->token, token.c_str(), sizeof(Header::token)) != 0) {
        munmap(segment, kSegmentBytes);
        throw std::runtime_error(path + " is another segment");
    }
    peers_[rank] = {segment, alive.release(), host};
}

Header& SharedMemory::header(int rank) const { return *reinterpret_cast<Header*>(peers_[rank].segment); }

char* SharedMemory::input(int rank, uint32_t step) const {
    return peers_[rank].segment + kHeaderBytes + (step % kSlots) * kChunk;
}

char* SharedMemory::output(int rank, uint32_t step) const { return input(rank, step) + kSlots * kChunk; }

void SharedMemory::fail(const std::string& text) {
    std::lock_guard lock(error_mutex_);
    if (error_.empty()) error_ = text;
    Header& own = header(rank_);
    if (own.failed.load() || getpid() != process_) return;
    const size_t length = std::min(error_.size(), sizeof(own.error) - 1);
    std::memcpy(own.error, error_.data(), length);
    own.error[length] = 0;
    own.failed.store(1);
    for (Counter* counter : {&own.published, &own.reduced}) advance(*counter, counter->steps.load());
}

std::string SharedMemory::error() const {
    std::lock_guard lock(error_mutex_);
    return error_;
}

void SharedMemory::interrupt(const std::string& text) {
    if (interrupting_.exchange(true)) return;
    interruption_ = text;
    interrupted_.store(true);
}

void SharedMemory::run(const Call& call, const void* in, void* out, double timeout_seconds,
                       const std::function<void(const std::string&)>& poll) {
    std::lock_guard lock(mutex_);
    if (const std::string before = error(); !before.empty()) throw PeerFailure("this group failed before: " + before);
    for (const Peer& peer : peers_)
        if (!peer.segment) throw std::runtime_error("not every peer's segment is open");
    Wait wait{timeout_seconds, {}, poll};
    try {
        number_ = call.number;
        note_core();
        // Rank 0 says one operation ahead how to write, so that all do it alike.
        const int size_class = Pace::size_class(call.numel * element_size(call.dtype));
        streams_ = header(0).operations[sequence_ % 4].streams >> size_class & 1;
        ++sequence_;
        header(rank_).operations[sequence_ % 4] = {sequence_, call, pace_.streams()};
        dispatch(call, static_cast<const char*>(in), static_cast<char*>(out), wait);
    } catch (const PeerFailure& failure) {
        fail(failure.what());
        throw;
    } catch (...) {
        fail("rank " + std::to_string(rank_) + " was interrupted in operation " + std::to_string(number_));
        throw;
    }
}

// Waits until every rank has begun this operation, and throws unless all were called with the same. Every rank compares
// itself with all others, and no rank goes on before: where two differ, all of them find a difference.
void SharedMemory::compare_headers(Wait& wait) {
    const Operation& own = header(rank_).operations[sequence_ % 4];
    const uint32_t first = header(rank_).published.steps.load(std::memory_order_relaxed);
    for (int rank = 0; rank < world_size_; ++rank)
        if (rank != rank_) await(rank, false, first, wait);
    for (int rank = 0; rank < world_size_; ++rank) {
        const Operation& other = header(rank).operations[sequence_ % 4];
        if (other.sequence == own.sequence && other.call == own.call) continue;
        throw PeerFailure("operation " + std::to_string(number_) + ": " + name(rank) + " called " + words(other.call) +
                          ", rank " + std::to_string(rank_) + " " + words(own.call));
    }
    wait.together = Clock::now();
}

std::string SharedMemory::name(int rank) const { return "rank " + std::to_string(rank) + " on " + peers_[rank].host; }

void SharedMemory::note_core() const { header(rank_).core.store(sched_getcpu(), std::memory_order_relaxed); }

// Where a rank was last seen.
size_t SharedMemory::core(int rank) const {
    return static_cast<uint32_t>(header(rank).core.load(std::memory_order_relaxed)) % kCores;
}

// Whether another rank was last seen on this one's core.
bool SharedMemory::shares_core() const {
    for (int rank = 0; rank < world_size_; ++rank)
        if (rank != rank_ && core(rank) == core(rank_)) return true;
    return false;
}

// Whether some core has two ranks more than another one, as last seen.
bool SharedMemory::uneven() const {
    std::array<uint16_t, kCores> ranks{};  // by core
    int most = 0, fewest = world_size_, used = 0;
    for (int rank = 0; rank < world_size_; ++rank) {
        const int here = ++ranks[core(rank)];
        most = std::max(most, here);
        used += here == 1;
    }
    if (most < 2) return false;
    if (used < cores_) return true;
    for (const int here : ranks)
        if (here) fewest = std::min(fewest, here);
    return most - fewest >= 2;
}

// Ranks that yield to one another on one core are left there by the kernel, though another core is idle, for tens of
// milliseconds or, where each wait is short, for good. So the last rank of a core with two more than another has moves
// to that one, and is free to be moved on. Not where others want to run too: it could meet one of them, and wait for
// its turn.
void SharedMemory::spread() {
    const auto now = Clock::now();
    if (now - looked_ < kSpreadEvery) return;
    looked_ = now;
    crowded_ = crowded(world_size_);
    cpu_set_t allowed, target, current;
    if (crowded_ || sched_getaffinity(0, sizeof(allowed), &allowed)) return;
    std::array<uint16_t, kCores> ranks{};
    for (int rank = 0; rank < world_size_; ++rank) ++ranks[core(rank)];
    const size_t own = core(rank_);
    for (int rank = rank_ + 1; rank < world_size_; ++rank)
        if (core(rank) == own) return;
    size_t best = own;
    for (size_t i = 2; i < kCores + 2; ++i) {  // the next number comes last: it is often the same core's other thread
        const size_t other = (own + i) % kCores;
        if (CPU_ISSET(other, &allowed) && ranks[other] < ranks[best]) best = other;
    }
    if (ranks[own] - ranks[best] < 2) return;
    CPU_ZERO(&target);
    CPU_SET(best, &target);
    if (sched_setaffinity(0, sizeof(target), &target)) return;
    // Back, unless somebody else has set another one meanwhile.
    if (sched_getaffinity(0, sizeof(current), &current) == 0 && CPU_EQUAL(&current, &target))
        sched_setaffinity(0, sizeof(allowed), &allowed);
    note_core();
}

// Waits until `rank` has published (or reduced) so many steps.
void SharedMemory::await(int rank, bool reduced, uint32_t steps, Wait& wait) {
    Counter& counter = reduced ? header(rank).reduced : header(rank).published;
    if (reached(counter, steps)) return;
    note_core();
    for (int yields = shares_core() ? 0 : -kLooks; yields < kPatience; ++yields) {
        for (int j = 0; j < 32 && core(rank) != core(rank_); ++j) {
            relax();
            if (reached(counter, steps)) return;
        }
        if (yields < 0) continue;
        if (yields % 16 == 0 && uneven()) spread();
        if (yields % 16 == kUnevenPatience && crowded_ && uneven()) break;
        sched_yield();
        note_core();
        if (reached(counter, steps)) return;
    }
    wait.begun = Clock::now();  // of this wait: a large tensor may take longer than the timeout as long as it moves
    while (!reached(counter, steps)) {
        sleep_on(counter, steps);
        if (reached(counter, steps)) return;
        const std::string text = trouble(wait);
        // A peer may have finished, and ended, between the two looks.
        if (reached(counter, steps)) return;
        if (!text.empty()) throw PeerFailure(text);
        if (interrupted_.load()) throw PeerFailure(interruption_ + " in operation " + std::to_string(number_));
        const bool warn = !wait.warned && Clock::now() - wait.begun >= kWarnAfter;
        wait.warned |= warn;
        wait.poll(warn ? "operation " + std::to_string(number_) + " has waited 10 s for " + name(rank) : std::string());
    }
}

// A rank that learns of a failure leaves the text and may be gone before others look: only who left none was lost.
std::string SharedMemory::lost() const {
    std::string told;
    for (int rank = 0; rank < world_size_; ++rank) {
        if (rank == rank_) continue;
        pollfd alive{peers_[rank].alive, POLLIN, 0};
        const bool ended = poll(&alive, 1, 0) > 0;  // before the text is looked for: then it won't come any more
        if (peers_[rank].segment && header(rank).failed.load())
            told = header(rank).error;
        else if (ended)
            return name(rank) + " died in operation " + std::to_string(number_);
    }
    return told;
}

// What is wrong with the peers; empty where they only take long.
std::string SharedMemory::trouble(Wait& wait) {
    if (std::string text = lost(); !text.empty()) return text;
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
    return name(last) + " did not answer within " + std::to_string(wait.seconds) + " s in operation " +
           std::to_string(number_);
}

}  // namespace engine::ring
