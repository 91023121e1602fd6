// Collectives among the ranks of one host, through one memory segment a rank.
//
// Each rank writes only its own segment and reads its peers'. An operation goes in steps, one chunk each; of a chunk
// every rank owns one slice. An all-reduce has three stages that run one chunk apart: publish (copy the peers' slices
// of a chunk into the own segment), reduce (add up the own slice of all ranks, in rank order), collect (copy the peers'
// reduced slices out). Reduce-scatter leaves out the last, all-gather the second. Small tensors take one stage less:
// everybody publishes all of it and adds up all of it.
//
// Two counters a rank say how many chunks ("steps", counted over all operations) it has published and reduced. They
// are all the synchronisation there is: publishing step i comes after finishing step i - 3, therefore whoever sees
// that a peer has published step i knows that this peer is done with the slots of step i - 3. Four slots suffice.
//
// How slots are written, into the caches or past them, is measured while running: pace.h.
#pragma once

#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

#include "ring/pace.h"
#include "ring/reduce.h"

namespace engine::ring {

// A peer that died, stalled or called something else; what() says which, on which host, in which operation.
struct PeerFailure : std::runtime_error {
    using std::runtime_error::runtime_error;
};

enum class Kind : int { all_reduce, reduce_scatter, all_gather };
enum class Codec : int { none, bf16, int8, bitmap };

// What all ranks must call alike.
struct Call {
    uint64_t number;  // of the operation, for the texts of errors
    Kind kind;
    Dtype dtype;
    Op op;        // sum for all_gather
    Codec codec;  // what would be sent between hosts; here bytes cost less than encoding, and nothing is encoded
    // Elements of the tensor that is reduced, of the result of reduce_scatter, of the input of all_gather.
    uint64_t numel;
    double density;   // of the bitmap codec, else 0
    int32_t compare;  // 1: no data goes, the ranks compare their calls alone

    bool operator==(const Call&) const = default;
};

struct Header;

class SharedMemory {
  public:
    // Reserves the segment. Throws std::runtime_error where the system refuses it.
    // `token` is a random text by which peers recognise the segment.
    SharedMemory(int rank, int world_size, const std::string& token);
    ~SharedMemory();
    SharedMemory(const SharedMemory&) = delete;
    SharedMemory& operator=(const SharedMemory&) = delete;

    // The segment's descriptor, -1 once published to everybody (`close_descriptor`).
    int descriptor() const { return descriptor_; }
    void close_descriptor();

    // Opens the segment that `rank` holds. Throws std::runtime_error where it isn't on this host, or is another's.
    void open_peer(int rank, int pid, int descriptor, const std::string& token, const std::string& host);

    // Runs a collective over all ranks.
    //   in        contiguous: numel elements, world size times as many for reduce_scatter
    //   out       contiguous: numel elements, world size times as many for all_gather; the same as `in` for all_reduce
    // `poll` is called some times a second while waiting, with a text to log or an empty one; what it throws ends the
    // operation. Throws PeerFailure.
    void run(const Call& call, const void* in, void* out, double timeout_seconds,
             const std::function<void(const std::string&)>& poll);

    // From another thread: ends an operation that waits, and all later ones, with this text.
    void interrupt(const std::string& text);
    // Refuses further use, and tells the peers why.
    // From any thread: it doesn't wait for an operation that runs.
    void fail(const std::string& text);
    // Names a peer that has died or failed; empty where all are well.
    std::string lost() const;

    static constexpr size_t kChunk = 256 << 10;  // bytes of a tensor that one step covers at most
    static constexpr int kSlots = 4;

  private:
    struct Peer {
        char* segment = nullptr;  // null where none is open; the own rank's stands here too
        int alive = -1;           // a pidfd, readable once the process has ended
        std::string host;
    };
    struct Wait;  // what a wait needs to know: the deadline, the poll function

    // One rank's part of one step.
    struct Slice {
        size_t offset;  // bytes, in the tensor that has all ranks' parts
        size_t slot;    // bytes, in the slot of the step
        size_t bytes;
    };
    using SliceOf = std::function<Slice(size_t step, int rank)>;
    // What a rank does in one step, by stage; null where a collective has no such stage. `i` counts the operation's
    // steps, `step` all.
    struct Stages {
        std::function<void(size_t i, uint32_t step)> publish, reduce;
        std::function<void(size_t i, uint32_t step, int peer)> collect;
    };

    void dispatch(const Call& call, const char* in, char* out, Wait& wait);
    void compare(Wait& wait);
    void one_stage(char* data, const Call& call, Wait& wait);
    void all_reduce(char* data, const Call& call, Wait& wait);
    void reduce_scatter(const char* in, char* out, const Call& call, Wait& wait);
    void all_gather(const char* in, char* out, const Call& call, Wait& wait);
    void publish_slices(const char* in, const SliceOf& slice, size_t i, uint32_t step);
    void reduce_slice(const char* in, const Slice& own, uint32_t step, char* result, char* copy, const Call& call);
    void pipeline(size_t steps, const Stages& stages, Wait& wait);
    void write(char* to, const char* from, size_t bytes) const;
    void compare_headers(Wait& wait);
    void note_core() const;
    size_t core(int rank) const;
    bool shares_core() const;
    bool uneven() const;
    void spread();
    void await(int rank, bool reduced, uint32_t steps, Wait& wait);
    std::string trouble(Wait& wait);
    std::string error() const;
    std::string name(int rank) const;
    Header& header(int rank) const;
    char* input(int rank, uint32_t step) const;
    char* output(int rank, uint32_t step) const;

    int rank_, world_size_, descriptor_ = -1;
    std::vector<Peer> peers_;
    std::vector<const void*> sources_;  // [world_size], of one reduction
    uint32_t step_ = 0;                 // the first step of the next operation; wraps around
    uint64_t number_ = 0;               // of the operation that runs or ran last
    uint64_t sequence_ = 0;             // exchanges begun: an operation may take several
    int cores_ = 1;                     // that this process may use
    bool crowded_ = true;               // whether others than the ranks wanted to run, when last looked
    int process_;                       // that owns the segment: a forked child has it mapped too
    bool streams_ = false;              // this operation writes past the caches into its segment
    Pace pace_;                         // of rank 0
    std::string error_;                 // the first error's text: the group refuses further use with it
    mutable std::mutex error_mutex_;    // of error_ and what the own header says of it; taken last
    std::mutex mutex_;                  // held by an operation
    std::atomic<bool> interrupting_{false}, interrupted_{false};  // begun to be, and with its text
    std::string interruption_;
    std::chrono::steady_clock::time_point looked_{};
};

}  // namespace engine::ring
