// What a kernel is told to be able to wait for the peer's next piece: see peer.h, and peer_wait.cuh, which uses it.
// Also compiled at run time, so it includes next to nothing.
#pragma once

#include <cstdint>

namespace cfg_parallel {

constexpr int kPeerSlots = 2;

// Why a wait on the GPU ended without what it waited for.
enum class PeerFailure : std::uint32_t {
  kNone = 0,
  kTimeout = 1,
  kAborted = 2,
  kPeerFailed = 3,  // the other side gave up a wait of its own
  kBroken = 4,      // this side had given up another wait before
};

// The pieces of one direction, as one side counts them.
struct PeerCounter {
  std::uint64_t epoch;        // of the last piece
  std::uint32_t blocks_done;  // of the kernel that is at work on the next; 0 between kernels
};

// What ends a wait, besides what it waits for.
struct PeerLimits {
  const std::uint32_t* abort;        // host memory: not 0 when the host wants every wait to end
  std::uint64_t* looked;             // this GPU: when one of its threads last looked at that, by its clock
  std::uint32_t* failure;            // host memory: a PeerFailure; tells the host that a wait was given up
  std::uint64_t* failed;             // this GPU: not 0 when any wait of this side was given up
  const std::uint32_t* peer_failed;  // this GPU, written by the peer: the same of the peer
  std::uint32_t* tell_peer;          // the peer's GPU: its `peer_failed`
  std::uint64_t timeout_ns;
};

// What a kernel needs to read the next piece where it lies: a kernel parameter. PeerReader in peer_wait.cuh uses it.
struct PeerWait {
  PeerLimits limits;
  PeerCounter* counter;        // this GPU
  const std::uint64_t* flags;  // this GPU, written by the peer: of slot 0, then of slot 1
  const char* slots;           // this GPU, written by the peer
  std::uint64_t* consumed;     // the peer's GPU
  std::int64_t slot_bytes;
  int chunk_shift;  // a chunk has 1 << chunk_shift bytes
};

}  // namespace cfg_parallel
