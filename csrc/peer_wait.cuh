// The waits of the peer transport, and how a kernel reads a piece where it lies.
//
// A kernel that takes the place of PeerEndpoint::pull:
//
//   __global__ void kernel(const __grid_constant__ PeerWait wait, ...) {   // 1-D blocks, 1-D grid
//     PeerReader reader(wait);                       // all threads
//     for (...) {                                    // equal for all threads of a block
//       if (reader.arrived(begin, end)) {            // all threads of the block: has a barrier in it
//         ... plain loads from reader.slot() + [begin, end), by any thread of the block ...
//       }
//     }
//     reader.acknowledge();                          // all threads of every block, once, after their last such load
//   }
//
// * A block that has nothing to read calls `acknowledge` all the same: the last block of the grid tells the sender.
// * `arrived` is false when the wait was given up (time-out, abort, the peer's failure). What is in the slot then is
//   garbage; the kernel may use it or not, but goes on to `acknowledge` and ends. The error word tells the host.
// * A kernel that waits must leave room for others: it may wait for a push that has not started, and a push of this GPU
//   that finds no room can be what the peer needs first. So: on each SM at most 512 threads, with at most half of its
//   registers and shared memory, and never a cooperative launch.
// * The slot is written to while the kernel runs, so its loads must be ordinary ones (ld.global). The read-only path
//   (ld.global.nc: __ldg, or a `const T* __restrict__` parameter, which lets the compiler choose it) may give stale
//   values. Loads ahead of `arrived` are as wrong.
// * What a kernel stores after `acknowledge` does not hold up the sender, and the fence inside need not wait for it.
//
// Why the order is right, in the terms of the PTX memory model:
//
// Data. The sender's threads store a chunk (weak stores to the receiver's memory), meet at a barrier, and one of them
// does st.release.sys on the chunk's flag. A thread of the receiver's block reads the flag by ld.acquire.sys, and the
// block meets at a barrier. Barriers synchronise the threads of a block and release and acquire are cumulative, so each
// store happens before each load that follows `arrived`, and a load cannot give an older value. In hardware the release
// waits until the stores before it are performed at the receiver's L2, where all of its SMs look, and the acquire drops
// the lines of its own SM's L1, which is the L1 of all threads of the block.
//
// Reuse. The receiver's loads come before the barrier in `acknowledge`, that before the block's acq_rel count, the
// counts before the last block's, and that before its st.release.sys of `consumed` (one block needs no count). The
// sender reads `consumed` by ld.acquire.sys before a barrier, and its threads store after that. So each load of epoch e
// happens before each store of epoch e + 2 to the same slot, and cannot give the newer value.
//
// Flags. A flag word holds an epoch of its own slot, or 0. While the receiver waits for epoch e, the flags of that slot
// are those of epochs up to e: e + 2 is not pushed before e is consumed. So "equal to e" is "has landed".
//
// Counters. Every thread reads its counter's epoch before its block counts itself as done; the last block moves it on,
// when all have read it. The next kernel of that direction comes later in stream order, which makes the new value
// visible.
#pragma once

#include "memory_order.cuh"
#include "peer_wait.h"

namespace cfg_parallel {

constexpr int kPeerBlocksPerSm = 1;               // of a pull
constexpr std::uint32_t kPeerPollsPerLook = 256;  // between two looks at what else may end a wait
constexpr std::uint64_t kPeerAbortLookNs = 1'000'000;

__device__ inline void peer_give_up(const PeerLimits& limits, PeerFailure why) {
  if (ld_relaxed_sys(limits.failure) == 0) st_relaxed_sys(limits.failure, static_cast<std::uint32_t>(why));
  st_release_sys(limits.failed, 1);  // who sees this sees the reason, and does not write another one
  // Who aborts does so because the peer is gone, and the peer knows of its own failure.
  if (why == PeerFailure::kTimeout) st_relaxed_sys(limits.tell_peer, 1);
}

// The abort word is in host memory, where a look takes some 0.5 us and waits for the looks before it: when each of 2000
// warps that waited had a look of its own, an exchange that took 100 us took 1 ms more. So of all threads of this side
// that wait, one has a look now and then, and tells the others by `failed`.
__device__ inline bool peer_is_aborted(const PeerLimits& limits, std::uint64_t now) {
  const std::uint64_t looked = ld_relaxed_gpu(limits.looked);
  return now >= looked + kPeerAbortLookNs && atom_cas_relaxed_gpu(limits.looked, looked, now) &&
         ld_relaxed_sys(limits.abort) != 0;
}

// True as soon as `ready()` is; false when the wait was given up.
template <typename Ready>
__device__ inline bool peer_wait_until(const PeerLimits& limits, Ready ready) {
  std::uint64_t start = 0;
  for (std::uint32_t polls = 1; !ready(); ++polls) {
    if (polls % kPeerPollsPerLook != 0) continue;
    const std::uint64_t now = global_timer_ns();
    if (start == 0) start = now;
    PeerFailure why = PeerFailure::kNone;
    if (now - start > limits.timeout_ns) why = PeerFailure::kTimeout;
    if (ld_relaxed_sys(limits.peer_failed) != 0) why = PeerFailure::kPeerFailed;
    if (peer_is_aborted(limits, now)) why = PeerFailure::kAborted;
    if (ld_acquire_sys(limits.failed) != 0) why = PeerFailure::kBroken;  // the waits of a whole queue end at once
    if (why != PeerFailure::kNone) {
      peer_give_up(limits, why);
      return false;
    }
  }
  return true;
}

// By one thread of each block, when the block has read the counter: true for the last of them.
__device__ inline bool peer_is_last_block(PeerCounter* counter) {
  return gridDim.x == 1 || atom_add_acq_rel_gpu(&counter->blocks_done, 1) + 1 == gridDim.x;
}

// By the last block.
__device__ inline void peer_move_on(PeerCounter* counter, std::uint64_t epoch) {
  st_relaxed_gpu(&counter->blocks_done, 0);
  st_relaxed_gpu(&counter->epoch, epoch);
}

class PeerReader {
 public:
  __device__ explicit PeerReader(const PeerWait& wait)
      : wait_(wait), epoch_(ld_relaxed_gpu(&wait.counter->epoch) + 1), index_(static_cast<int>(epoch_ % kPeerSlots)) {}

  // The piece's bytes.
  __device__ const char* slot() const { return wait_.slots + index_ * wait_.slot_bytes; }

  // Waits until bytes [begin, end) of the piece are there; equal arguments and result for all threads of a block.
  __device__ bool arrived(std::int64_t begin, std::int64_t end) const {
    const int shift = wait_.chunk_shift;
    const std::uint64_t* flags = wait_.flags + index_ * (wait_.slot_bytes >> shift);
    bool missing = false;
    for (std::int64_t chunk = (begin >> shift) + threadIdx.x; (chunk << shift) < end; chunk += blockDim.x) {
      missing |= !peer_wait_until(wait_.limits, [&] { return ld_acquire_sys(flags + chunk) == epoch_; });
    }
    return __syncthreads_or(missing) == 0;
  }

  // The piece has been read, or given up.
  __device__ void acknowledge() const {
    __syncthreads();
    if (threadIdx.x != 0 || !peer_is_last_block(wait_.counter)) return;
    st_release_sys(wait_.consumed, epoch_);
    peer_move_on(wait_.counter, epoch_);  // behind the release, which need not wait for it
  }

 private:
  const PeerWait& wait_;
  std::uint64_t epoch_;
  int index_;
};

}  // namespace cfg_parallel
