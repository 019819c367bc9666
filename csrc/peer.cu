#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <cstring>
#include <random>
#include <source_location>
#include <utility>

#include "check.h"
#include "device_guard.h"
#include "peer.h"
#include "peer_kernels.cuh"

namespace cfg_parallel {
namespace {

// At the start of a block. The words of a line are written from one side only.
struct Control {
  alignas(128) std::uint64_t consumed;  // by the peer: the last of our pieces that it has read
  std::uint32_t peer_failed;            // by the peer: it has given up a wait
  alignas(128) PeerCounter pushed;
  alignas(128) PeerCounter pulled;
  alignas(128) std::uint64_t failed;  // a kernel of this side has given up a wait
  std::uint64_t looked;               // when a kernel of this side last looked at the host's `abort`
};

// Pinned host memory that the GPU reads and writes.
struct HostWords {
  std::uint32_t abort;
  std::uint32_t push_failure;
  std::uint32_t pull_failure;
};

// What travels to the peer.
struct Handle {
  std::uint64_t process;  // a number of this process: within one, addresses are good without IPC
  void* block;
  int device;
  std::int64_t slot_bytes;
  std::int64_t chunk_bytes;
  cudaIpcMemHandle_t memory;
};

std::uint64_t this_process() {
  // Drawn once a process; the id is mixed in because a fork copies what was drawn.
  static const std::uint64_t drawn = [] {
    std::random_device device;
    return static_cast<std::uint64_t>(device()) << 32 | device();
  }();
  return drawn ^ static_cast<std::uint64_t>(getpid());
}

constexpr std::int64_t round_up(std::int64_t value, std::int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

constexpr std::int64_t kFlagsOffset = round_up(sizeof(Control), 256);

PeerTable to_table(const std::vector<PeerSegment>& segments, std::int64_t slot_bytes) {
  if (segments.empty() || segments.size() > kPeerMaxSegments) {
    throw Error("Expected 1 to " + std::to_string(kPeerMaxSegments) + " segments, but got " +
                std::to_string(segments.size()));
  }
  PeerTable table{};
  for (const PeerSegment& segment : segments) {
    if (segment.bytes < 1 || segment.offset < table.bytes || segment.offset % kPeerAlignment != 0 ||
        segment.offset + segment.bytes > slot_bytes) {
      throw Error("Expected segments in order within a slot of " + std::to_string(slot_bytes) +
                  " bytes, at multiples of " + std::to_string(kPeerAlignment) + ", but got " +
                  std::to_string(segment.bytes) + " bytes at " + std::to_string(segment.offset));
    }
    table.segments[table.count++] = segment;
    table.bytes = segment.offset + segment.bytes;
  }
  return table;
}

}  // namespace

struct PeerEndpoint::State {
  int device = 0;
  int num_sms = 0;
  int push_blocks_per_sm = 0;
  std::int64_t slot_bytes = 0;
  std::int64_t chunk_bytes = 0;
  std::uint64_t timeout_ns = 0;
  char* block = nullptr;     // ours
  char* peer = nullptr;      // the peer's
  bool is_imported = false;  // and not of this process
  HostWords* host = nullptr;

  std::int64_t slots_offset() const {
    const std::int64_t flags = kPeerSlots * (slot_bytes / chunk_bytes);
    return round_up(kFlagsOffset + flags * static_cast<std::int64_t>(sizeof(std::uint64_t)), 4096);
  }
  int chunk_shift() const { return std::countr_zero(static_cast<std::uint64_t>(chunk_bytes)); }
  Control* control() const { return reinterpret_cast<Control*>(block); }
  Control* peer_control() const { return reinterpret_cast<Control*>(peer); }

  PeerLimits limits(std::uint32_t* failure) const {
    return {.abort = &host->abort,
            .looked = &control()->looked,
            .failure = failure,
            .failed = &control()->failed,
            .peer_failed = &control()->peer_failed,
            .tell_peer = &peer_control()->peer_failed,
            .timeout_ns = timeout_ns};
  }
  PeerCredit credit() const {
    return {.limits = limits(&host->push_failure), .counter = &control()->pushed, .consumed = &control()->consumed};
  }
  // At most `per_sm` blocks for each SM, and at least a tile for each block: the smallest tiles that are not more than
  // the blocks, of up to `most` bytes.
  int tile_shift(const PeerTable& table, int per_sm, std::int64_t most) const {
    int shift = chunk_shift();
    while ((std::int64_t{1} << shift) < most && tiles(table, shift) > std::int64_t{per_sm} * num_sms) ++shift;
    return shift;
  }
  unsigned grid(const PeerTable& table, int shift, int per_sm) const {
    return static_cast<unsigned>(std::min(tiles(table, shift), std::int64_t{per_sm} * num_sms));
  }
  static std::int64_t tiles(const PeerTable& table, int shift) { return ((table.bytes - 1) >> shift) + 1; }
  void require_connected(const std::source_location& where = std::source_location::current()) const {
    if (block == nullptr) throw Error("this peer endpoint was closed", where);
    if (peer == nullptr) throw Error("this peer endpoint is not connected", where);
  }
};

PeerEndpoint::PeerEndpoint(int device, std::int64_t slot_bytes, std::int64_t chunk_bytes, int push_blocks_per_sm)
    : state_(std::make_unique<State>()) {
  if (chunk_bytes < kPeerAlignment || !std::has_single_bit(static_cast<std::uint64_t>(chunk_bytes)) ||
      slot_bytes < chunk_bytes || slot_bytes % chunk_bytes != 0) {
    throw Error("Expected chunk_bytes to be a power of two of at least " + std::to_string(kPeerAlignment) +
                " and slot_bytes a multiple of it, but got " + std::to_string(chunk_bytes) + " and " +
                std::to_string(slot_bytes));
  }
  if (push_blocks_per_sm < 1) {
    throw Error("Expected push_blocks_per_sm >= 1, but got " + std::to_string(push_blocks_per_sm));
  }
  State& state = *state_;
  state.device = device;
  state.push_blocks_per_sm = push_blocks_per_sm;
  state.slot_bytes = slot_bytes;
  state.chunk_bytes = chunk_bytes;
  set_timeout(600);
  const DeviceGuard guard(device);
  check(cudaDeviceGetAttribute(&state.num_sms, cudaDevAttrMultiProcessorCount, device));
  // A kernel is loaded at its first launch, which can wait for the device to be idle; with a kernel of ours at a wait
  // for the one to be loaded, it never would be.
  cudaFuncAttributes attributes;
  check(cudaFuncGetAttributes(&attributes, peer_gate_kernel));
  check(cudaFuncGetAttributes(&attributes, peer_push_kernel));
  check(cudaFuncGetAttributes(&attributes, peer_pull_kernel));
  try {
    check(cudaHostAlloc(reinterpret_cast<void**>(&state.host), sizeof(HostWords),
                        cudaHostAllocMapped | cudaHostAllocPortable));
    *state.host = {};
    check(cudaMalloc(reinterpret_cast<void**>(&state.block),
                     static_cast<std::size_t>(state.slots_offset() + kPeerSlots * slot_bytes)));
    check(cudaMemset(state.block, 0, static_cast<std::size_t>(state.slots_offset())));
    check(cudaDeviceSynchronize());  // zero before the peer can write to it
  } catch (...) {
    static_cast<void>(cudaFree(std::exchange(state.block, nullptr)));
    static_cast<void>(cudaFreeHost(std::exchange(state.host, nullptr)));
    throw;
  }
}

PeerEndpoint::~PeerEndpoint() {
  try {
    close();
    const DeviceGuard guard(state_->device);
    check(cudaFreeHost(state_->host));  // not in `close`: until now another thread may call `abort`
  } catch (const Error&) {
    // A destructor has nobody to report to, and at interpreter exit CUDA may be gone already.
  }
}

std::string PeerEndpoint::handle() const {
  const State& state = *state_;
  if (state.block == nullptr) throw Error("this peer endpoint was closed");
  Handle handle{};
  handle.process = this_process();
  handle.block = state.block;
  handle.device = state.device;
  handle.slot_bytes = state.slot_bytes;
  handle.chunk_bytes = state.chunk_bytes;
  const DeviceGuard guard(state.device);
  check(cudaIpcGetMemHandle(&handle.memory, state.block));
  return {reinterpret_cast<const char*>(&handle), sizeof(handle)};
}

void PeerEndpoint::connect(const std::string& bytes) {
  State& state = *state_;
  if (state.block == nullptr) throw Error("this peer endpoint was closed");
  if (state.peer != nullptr) throw Error("this peer endpoint is connected already");
  Handle handle{};
  if (bytes.size() != sizeof(handle)) {
    throw Error("Expected a peer handle of " + std::to_string(sizeof(handle)) + " bytes, but got " +
                std::to_string(bytes.size()));
  }
  std::memcpy(&handle, bytes.data(), sizeof(handle));
  if (handle.slot_bytes != state.slot_bytes || handle.chunk_bytes != state.chunk_bytes) {
    throw Error("Expected the peer to have slots of " + std::to_string(state.slot_bytes) + " bytes in chunks of " +
                std::to_string(state.chunk_bytes) + ", but got " + std::to_string(handle.slot_bytes) + " and " +
                std::to_string(handle.chunk_bytes));
  }
  const DeviceGuard guard(state.device);
  if (handle.process == this_process()) {
    if (handle.device != state.device) {
      const cudaError_t status = cudaDeviceEnablePeerAccess(handle.device, 0);
      if (status == cudaErrorPeerAccessAlreadyEnabled) {
        static_cast<void>(cudaGetLastError());
      } else {
        check(status);
      }
    }
    state.peer = static_cast<char*>(handle.block);
    return;
  }
  void* peer = nullptr;
  check(cudaIpcOpenMemHandle(&peer, handle.memory, cudaIpcMemLazyEnablePeerAccess));
  state.peer = static_cast<char*>(peer);
  state.is_imported = true;
}

void PeerEndpoint::gate(cudaStream_t stream) {
  const State& state = *state_;
  state.require_connected();
  const DeviceGuard guard(state.device);
  peer_gate_kernel<<<1, 1, 0, stream>>>(state.credit());
  check(cudaGetLastError());
}

void PeerEndpoint::push(const std::vector<PeerSegment>& segments, cudaStream_t stream) {
  const State& state = *state_;
  state.require_connected();
  PeerPush push{.credit = state.credit(),
                .flags = reinterpret_cast<std::uint64_t*>(state.peer + kFlagsOffset),
                .slots = state.peer + state.slots_offset(),
                .slot_bytes = state.slot_bytes,
                .chunk_shift = state.chunk_shift(),
                .tile_shift = 0,
                .table = to_table(segments, state.slot_bytes)};
  push.tile_shift = state.tile_shift(push.table, state.push_blocks_per_sm, kPeerPushTile);
  const unsigned blocks = state.grid(push.table, push.tile_shift, state.push_blocks_per_sm);
  const DeviceGuard guard(state.device);
  peer_push_kernel<<<blocks, kPeerThreads, 0, stream>>>(push);
  check(cudaGetLastError());
}

void PeerEndpoint::pull(const std::vector<PeerSegment>& segments, cudaStream_t stream) {
  const State& state = *state_;
  PeerPull pull{.wait = wait(), .tile_shift = 0, .table = to_table(segments, state.slot_bytes)};
  pull.tile_shift = state.tile_shift(pull.table, kPeerBlocksPerSm, kPeerPullTile);
  const unsigned blocks = state.grid(pull.table, pull.tile_shift, kPeerBlocksPerSm);
  const DeviceGuard guard(state.device);
  peer_pull_kernel<<<blocks, kPeerThreads, 0, stream>>>(pull);
  check(cudaGetLastError());
}

PeerWait PeerEndpoint::wait() const {
  const State& state = *state_;
  state.require_connected();
  return {.limits = state.limits(&state.host->pull_failure),
          .counter = &state.control()->pulled,
          .flags = reinterpret_cast<const std::uint64_t*>(state.block + kFlagsOffset),
          .slots = state.block + state.slots_offset(),
          .consumed = &state.peer_control()->consumed,
          .slot_bytes = state.slot_bytes,
          .chunk_shift = state.chunk_shift()};
}

void PeerEndpoint::set_timeout(double seconds) {
  if (!(seconds > 0)) throw Error("Expected a timeout above 0 s, but got " + std::to_string(seconds));
  state_->timeout_ns = static_cast<std::uint64_t>(std::min(seconds, 1e9) * 1e9);  // 1e9 s are 30 years
}

double PeerEndpoint::timeout() const { return static_cast<double>(state_->timeout_ns) * 1e-9; }

PeerFailure PeerEndpoint::push_failure() const {
  return static_cast<PeerFailure>(std::atomic_ref(state_->host->push_failure).load(std::memory_order_acquire));
}

PeerFailure PeerEndpoint::pull_failure() const {
  return static_cast<PeerFailure>(std::atomic_ref(state_->host->pull_failure).load(std::memory_order_acquire));
}

void PeerEndpoint::abort() noexcept { std::atomic_ref(state_->host->abort).store(1, std::memory_order_release); }

void PeerEndpoint::detach() {
  State& state = *state_;
  abort();
  char* peer = std::exchange(state.peer, nullptr);
  if (peer == nullptr) return;
  const DeviceGuard guard(state.device);
  check(cudaDeviceSynchronize());
  if (state.is_imported) check(cudaIpcCloseMemHandle(peer));
}

void PeerEndpoint::close() {
  detach();
  State& state = *state_;
  char* block = std::exchange(state.block, nullptr);
  if (block == nullptr) return;
  const DeviceGuard guard(state.device);
  check(cudaFree(block));
}

int PeerEndpoint::device() const { return state_->device; }
std::int64_t PeerEndpoint::slot_bytes() const { return state_->slot_bytes; }
std::int64_t PeerEndpoint::chunk_bytes() const { return state_->chunk_bytes; }

}  // namespace cfg_parallel
