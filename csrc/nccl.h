// Point-to-point NCCL on a communicator of our own, through the libnccl that is already in the process.
//
// The library is found with dlopen/dlsym: one build of this module works with whatever NCCL the installed PyTorch
// brings, and loads where there is none.
#pragma once

#include <cuda_runtime.h>

#include <array>
#include <cstddef>
#include <memory>
#include <optional>
#include <string>
#include <vector>

namespace cfg_parallel {

// ncclUniqueId: 128 opaque bytes that rank 0 makes and every other rank receives over the control link.
using NcclUniqueId = std::array<char, 128>;

struct Buffer {
  void* data;
  std::size_t bytes;
};

int nccl_version();  // 22809 for 2.28.9
NcclUniqueId nccl_unique_id();

// Owns a communicator; move-only.
//
// send and recv enqueue one NCCL group on `stream` and return; the buffers must stay alive until the stream has
// passed it. Both sides must name the same sizes in the same order. Empty buffers are skipped on both sides.
// The first exchange with a peer connects to it and so blocks the host until the peer takes part.
//
// Thread safety: send and recv exclude each other; abort and async_error may be called from any thread at any time.
class NcclComm {
 public:
  // Blocks until all `world_size` ranks have called it with the same id.
  NcclComm(const NcclUniqueId& id, int rank, int world_size, int device);
  // Destroys the communicator, or aborts it when NCCL has reported an asynchronous error.
  ~NcclComm();
  NcclComm(NcclComm&&) noexcept;
  NcclComm& operator=(NcclComm&&) noexcept;

  void send(const std::vector<Buffer>& buffers, int peer, cudaStream_t stream);
  void recv(const std::vector<Buffer>& buffers, int peer, cudaStream_t stream);

  // Ends pending kernels and host calls with an error and frees the communicator. Idempotent.
  void abort();
  // Frees the communicator after the work enqueued on it is done; for the orderly end of a link. Idempotent.
  void destroy();
  // What NCCL found wrong in the background (a dead peer, a network failure), if anything.
  std::optional<std::string> async_error();

  int rank() const;
  int world_size() const;
  int device() const;

 private:
  struct State;
  enum class Direction { kSend, kRecv };
  void exchange(Direction direction, const std::vector<Buffer>& buffers, int peer, cudaStream_t stream);

  std::unique_ptr<State> state_;
};

}  // namespace cfg_parallel
