// The peer transport: two processes, each with a block of memory on its own GPU that the other one maps (CUDA IPC) and
// writes into, over NVLink or PCIe. Nobody reads the other's memory; both write there and read at home.
//
//   block (one cudaMalloc) = control words | flags of the two slots | slot 0 | slot 1
//
// A message travels in pieces of at most a slot. Piece number `epoch` (1, 2, 3, ...; 64 bits, so it never wraps) goes
// through slot epoch % 2 of the receiver in chunks; each chunk has a flag, which is set to the epoch when the chunk has
// landed. When the receiver has read a piece it writes the epoch to `consumed` in the sender's block, and the sender
// overwrites a slot only when the piece that was in it is consumed.
//
// The epochs are counted in device memory by the kernels themselves, so a launch that is replayed from a CUDA graph
// goes on counting, and the slots alternate. Hence launches of one direction must be ordered on each side: on one
// stream, or by events.
//
// peer_wait.cuh has the waits and why their memory order is right; peer_kernels.cuh has the kernels.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "peer_wait.h"

namespace cfg_parallel {

// In one piece; they are kernel parameters, of which there are 4 KiB.
constexpr int kPeerMaxSegments = 64;
// Of a segment's offset in a slot, at least: what a 16-byte access needs.
constexpr std::int64_t kPeerAlignment = 16;

// Consecutive bytes of one tensor, and where in the slot they lie.
struct PeerSegment {
  void* data;  // this GPU; any alignment
  std::int64_t bytes;
  std::int64_t offset;  // a multiple of kPeerAlignment
};

// One side of the transport; move-only by way of a unique_ptr. Every method but `abort` is for one thread at a time.
//
// How it ends. CUDA wants an importer to close its mapping before the exporter frees the memory. So: `detach` on both
// sides, tell each other over another road, then `close` on both. When the peer's process has died there is nobody to
// wait for: the driver keeps the memory behind a mapping for as long as there is one, so what a kernel still writes
// there goes nowhere, and `close` takes it down.
class PeerEndpoint {
 public:
  // Allocates the block. `slot_bytes` is a multiple of `chunk_bytes`, which is a power of two; both must be equal on
  // both sides. A push uses at most `push_blocks_per_sm` blocks of 256 threads for each SM.
  PeerEndpoint(int device, std::int64_t slot_bytes, std::int64_t chunk_bytes, int push_blocks_per_sm);
  ~PeerEndpoint();
  PeerEndpoint(const PeerEndpoint&) = delete;
  PeerEndpoint& operator=(const PeerEndpoint&) = delete;

  // Opaque bytes for the peer's `connect`.
  std::string handle() const;
  // Maps the peer's block. A handle of this same process works too, without IPC: for tests on one GPU.
  void connect(const std::string& handle);

  // Enqueue on `stream`: wait until the peer has consumed all but the last of the pieces pushed so far, with one
  // thread. A push waits for that too, but with all of its blocks, which would keep other kernels off the GPU.
  void gate(cudaStream_t stream);
  // Enqueue on `stream`: push the next piece. The data must stay as it is until the stream has passed this.
  // Segments are in the order of their offsets, and do not overlap.
  void push(const std::vector<PeerSegment>& segments, cudaStream_t stream);
  // Enqueue on `stream`: wait for the next piece and copy it out: the same bytes and offsets as the peer's push.
  void pull(const std::vector<PeerSegment>& segments, cudaStream_t stream);
  // For a kernel that reads the next piece itself, in the place of `pull`.
  PeerWait wait() const;

  // How long a wait of the kernels enqueued from now on may take.
  void set_timeout(double seconds);
  double timeout() const;
  // The first wait that was given up, of each direction; valid once the stream has passed the kernel.
  PeerFailure push_failure() const;
  PeerFailure pull_failure() const;

  // Ends every wait on the GPU, now and from now on. From any thread, at any time; makes no CUDA call.
  void abort() noexcept;
  // Aborts, waits for the device and unmaps the peer's block. Idempotent.
  void detach();
  // Detaches and frees the block. Idempotent.
  void close();

  int device() const;
  std::int64_t slot_bytes() const;
  std::int64_t chunk_bytes() const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace cfg_parallel
