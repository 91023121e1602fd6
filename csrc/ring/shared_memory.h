// All-reduce among the ranks of one host, through one memory segment a rank.
//
// Each rank writes only its own segment and reads its peers'. An operation goes in chunks; every rank owns one slice of
// a chunk. Three stages run one chunk apart: publish (copy the peers' slices of a chunk into the own segment), reduce
// (add up the own slice of all ranks, in rank order), collect (copy the peers' reduced slices out). Small tensors take
// one stage less: everybody publishes all of it and adds up all of it.
//
// Two counters a rank say how many chunks ("steps", counted over all operations) it has published and reduced. They
// are all the synchronisation there is: publishing step i comes after collecting step i - 3, therefore whoever sees
// that a peer has published step i knows that this peer is done with the slots of step i - 3. Four slots suffice.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

#include "ring/reduce.h"

namespace engine::ring {

// A peer that died, stalled or called something else; what() says which, on which host, in which operation.
struct PeerFailure : std::runtime_error {
    using std::runtime_error::runtime_error;
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

    // Reduces `numel` elements at `data` in place over all ranks. `poll` is called some times a second while waiting,
    // with a text to log or an empty one; what it throws ends the operation. Throws PeerFailure.
    void all_reduce(void* data, size_t numel, Dtype dtype, Op op, double timeout_seconds,
                    const std::function<void(const std::string&)>& poll);

    static constexpr size_t kChunk = 256 << 10;  // bytes of a tensor that one step covers at most
    static constexpr int kSlots = 4;

  private:
    struct Peer {
        char* segment = nullptr;  // null where none is open; the own rank's stands here too
        int alive = -1;           // a pidfd, readable once the process has ended
        std::string host;
    };
    struct Wait;  // what a wait needs to know: the deadline, the poll function, the operation's number

    void run(char* data, size_t numel, Dtype dtype, Op op, Wait& wait);
    void one_stage(char* data, size_t numel, Dtype dtype, Op op, Wait& wait);
    void three_stages(char* data, size_t numel, Dtype dtype, Op op, Wait& wait);
    void compare_headers(Wait& wait);
    void await(int rank, bool reduced, uint32_t steps, Wait& wait);
    std::string trouble(Wait& wait);
    void fail(const std::string& text);
    Header& header(int rank) const;
    char* input(int rank, uint32_t step) const;
    char* output(int rank, uint32_t step) const;

    int rank_, world_size_, descriptor_ = -1;
    int patience_;  // looks at a counter before sleeping; few where ranks outnumber cores
    std::vector<Peer> peers_;
    uint32_t step_ = 0;    // the first step of the next operation; wraps around
    uint64_t number_ = 0;  // operations begun
    std::string error_;    // the first error's text: the group refuses further use with it
    std::mutex mutex_;
};

}  // namespace engine::ring
