// The kernels of the peer transport: push a piece into the peer's slot, copy a piece out of our own.
#pragma once

#include "peer.h"
#include "peer_wait.cuh"

namespace cfg_parallel {

constexpr int kPeerThreads = 256;
// 16-byte loads that a thread has in flight: 16 KiB for a block. NVLink's 390 GB/s over some 1 us from HBM to the
// peer's L2 ask for 400 KB in flight on the whole GPU.
constexpr int kPeerUnroll = 4;
// A block copies a tile at a time: one chunk, or several where there are more chunks than blocks, because the fence
// ahead of the flags takes as long as some KiB on the link. At most this many bytes, so that the receiver gets to work
// while the rest is on its way. 132 blocks, one for each SM, with 32 KiB fill the link; more of either only have more
// bytes wait for it, so that the first chunk lands later.
constexpr std::int64_t kPeerPushTile = 32 << 10;
constexpr std::int64_t kPeerPullTile = 16 << 10;

// By value, in the constant bank. What every message needs comes first: a block waits for each line that it reads
// there.
struct PeerTable {
  std::int64_t bytes;  // of the piece: the end of the last segment
  int count;
  PeerSegment segments[kPeerMaxSegments];  // by offset
};

struct PeerCredit {
  PeerLimits limits;
  PeerCounter* counter;           // this GPU
  const std::uint64_t* consumed;  // this GPU, written by the peer
};

struct PeerPush {
  PeerCredit credit;
  std::uint64_t* flags;  // the peer's GPU
  char* slots;           // the peer's GPU
  std::int64_t slot_bytes;
  int chunk_shift;
  int tile_shift;  // not below chunk_shift
  PeerTable table;
};

struct PeerPull {
  PeerWait wait;
  int tile_shift;
  PeerTable table;
};

template <int kWidth>
struct PeerWord;
template <>
struct PeerWord<16> {
  using type = uint4;
};
template <>
struct PeerWord<4> {
  using type = std::uint32_t;
};
template <>
struct PeerWord<1> {
  using type = std::uint8_t;
};

// 16 bytes, by accesses of kWidth bytes, to which the address is aligned.
template <int kWidth>
struct alignas(16) PeerVec {
  using Word = typename PeerWord<kWidth>::type;
  Word words[16 / kWidth];
};

template <int kWidth>
__device__ __forceinline__ uint4 peer_load(const char* address) {
  PeerVec<kWidth> vec;
#pragma unroll
  for (int i = 0; i < 16 / kWidth; ++i) {
    vec.words[i] = reinterpret_cast<const typename PeerVec<kWidth>::Word*>(address)[i];
  }
  uint4 value;
  memcpy(&value, &vec, sizeof(value));
  return value;
}

template <int kWidth>
__device__ __forceinline__ void peer_store(char* address, const uint4& value) {
  PeerVec<kWidth> vec;
  memcpy(&vec, &value, sizeof(value));
#pragma unroll
  for (int i = 0; i < 16 / kWidth; ++i) {
    reinterpret_cast<typename PeerVec<kWidth>::Word*>(address)[i] = vec.words[i];
  }
}

// What a thread has of kPeerUnroll rounds of the block, in 16 bytes each, from number `first` on.
using PeerHeld = uint4[kPeerUnroll];

template <int kWidth>
__device__ __forceinline__ void peer_load_all(PeerHeld& held, const char* from, int first, int vecs) {
#pragma unroll
  for (int u = 0; u < kPeerUnroll; ++u) {
    const int i = first + static_cast<int>(u * blockDim.x + threadIdx.x);
    if (i < vecs) held[u] = peer_load<kWidth>(from + 16 * i);
  }
}

template <int kWidth>
__device__ __forceinline__ void peer_store_all(char* to, const PeerHeld& held, int first, int vecs) {
#pragma unroll
  for (int u = 0; u < kPeerUnroll; ++u) {
    const int i = first + static_cast<int>(u * blockDim.x + threadIdx.x);
    if (i < vecs) peer_store<kWidth>(to + 16 * i, held[u]);
  }
}

enum class PeerDirection { kIntoSlot, kOutOfSlot };

// Between `data` and the slot's bytes from `offset` on, a multiple of 16, by a whole block. `get_slot` is called by all
// of its threads, when they need it: behind the first loads, where these are from `data`. Nothing is stored when it is
// null.
template <PeerDirection kDirection, typename GetSlot>
__device__ __forceinline__ void peer_copy(char* data, GetSlot& get_slot, std::int64_t offset, int bytes) {
  constexpr bool kInto = kDirection == PeerDirection::kIntoSlot;
  const auto address = reinterpret_cast<std::uintptr_t>(data);
  const int width = address % 16 == 0 ? 16 : address % 4 == 0 ? 4 : 1;
  const int vecs = bytes / 16;
  int first = 0;
  char* slot;
  do {
    PeerHeld held;
    if constexpr (kInto) {
      if (width == 16) {
        peer_load_all<16>(held, data, first, vecs);
      } else if (width == 4) {
        peer_load_all<4>(held, data, first, vecs);
      } else {
        peer_load_all<1>(held, data, first, vecs);
      }
      slot = get_slot();
      if (slot == nullptr) return;
      peer_store_all<16>(slot + offset, held, first, vecs);
    } else {
      slot = get_slot();
      peer_load_all<16>(held, slot + offset, first, vecs);
      if (width == 16) {
        peer_store_all<16>(data, held, first, vecs);
      } else if (width == 4) {
        peer_store_all<4>(data, held, first, vecs);
      } else {
        peer_store_all<1>(data, held, first, vecs);
      }
    }
    first += kPeerUnroll * static_cast<int>(blockDim.x);
  } while (first < vecs);
  char* to = kInto ? slot + offset : data;
  const char* from = kInto ? data : slot + offset;
  for (int i = 16 * vecs + static_cast<int>(threadIdx.x); i < bytes; i += static_cast<int>(blockDim.x)) to[i] = from[i];
}

// What lies in bytes [begin, end) of the piece, by a whole block.
template <PeerDirection kDirection, typename GetSlot>
__device__ inline void peer_copy_tile(const PeerTable& table, GetSlot get_slot, std::int64_t begin, std::int64_t end) {
  int low = 0;  // the first segment that ends after `begin`
  for (int high = table.count; low < high;) {
    const int middle = (low + high) / 2;
    const PeerSegment& segment = table.segments[middle];
    if (segment.offset + segment.bytes > begin) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  for (int i = low; i < table.count && table.segments[i].offset < end; ++i) {
    const PeerSegment& segment = table.segments[i];
    const std::int64_t from = max(begin, segment.offset);  // offsets and tiles are multiples of 16
    const std::int64_t to = min(end, segment.offset + segment.bytes);
    char* data = static_cast<char*>(segment.data) + (from - segment.offset);
    peer_copy<kDirection>(data, get_slot, from, static_cast<int>(to - from));
  }
}

// Waits until the slot of `epoch` may be overwritten; false when it may not, now or ever. By one thread.
__device__ inline bool peer_has_credit(const PeerCredit& credit, std::uint64_t epoch) {
  const std::uint64_t failed = ld_relaxed_gpu(credit.limits.failed);  // in flight beside the first poll
  if (!peer_wait_until(credit.limits, [&] { return ld_acquire_sys(credit.consumed) + kPeerSlots >= epoch; })) {
    return false;
  }
  // After a failure nothing may look as if it had been sent: it may be made of what a kernel received in part.
  if (failed != 0) peer_give_up(credit.limits, PeerFailure::kBroken);
  return failed == 0;
}

__global__ void peer_gate_kernel(const __grid_constant__ PeerCredit credit) {
  peer_has_credit(credit, ld_relaxed_gpu(&credit.counter->epoch) + 1);
}

// The slot of the next piece, for a whole block: equal for all of its threads. The first call waits until the slot may
// be overwritten. What a block loads ahead of that call is on its way meanwhile, and while the counter is read.
class PeerPushSlot {
 public:
  __device__ explicit PeerPushSlot(const PeerPush& push) : push_(push) {}

  // Null when the slot must not be overwritten.
  __device__ __forceinline__ char* get() {
    if (epoch_ == 0) {
      epoch_ = ld_relaxed_gpu(&push_.credit.counter->epoch) + 1;
      const bool stop = threadIdx.x == 0 && !peer_has_credit(push_.credit, epoch_);
      if (__syncthreads_or(stop) == 0) slot_ = push_.slots + index() * push_.slot_bytes;
    }
    return slot_;
  }
  // From here on after `get`.
  __device__ std::uint64_t epoch() const { return epoch_; }
  __device__ std::uint64_t* flags() const { return push_.flags + index() * (push_.slot_bytes >> push_.chunk_shift); }

 private:
  __device__ int index() const { return static_cast<int>(epoch_ % kPeerSlots); }

  const PeerPush& push_;
  std::uint64_t epoch_ = 0;
  char* slot_ = nullptr;
};

// Every block has a tile at least, so that each of them reads the counter.
__global__ void __launch_bounds__(kPeerThreads) peer_push_kernel(const __grid_constant__ PeerPush push) {
  PeerPushSlot slot(push);
  for (std::int64_t tile = blockIdx.x; (tile << push.tile_shift) < push.table.bytes; tile += gridDim.x) {
    const std::int64_t begin = tile << push.tile_shift;
    const std::int64_t end = min(begin + (std::int64_t{1} << push.tile_shift), push.table.bytes);
    peer_copy_tile<PeerDirection::kIntoSlot>(push.table, [&] { return slot.get(); }, begin, end);
    if (slot.get() == nullptr) break;
    __syncthreads();
    for (std::int64_t chunk = (begin >> push.chunk_shift) + threadIdx.x; (chunk << push.chunk_shift) < end;
         chunk += blockDim.x) {
      st_release_sys(slot.flags() + chunk, slot.epoch());
    }
  }
  if (threadIdx.x == 0 && peer_is_last_block(push.credit.counter)) peer_move_on(push.credit.counter, slot.epoch());
}

__global__ void __launch_bounds__(kPeerThreads) peer_pull_kernel(const __grid_constant__ PeerPull pull) {
  const PeerReader reader(pull.wait);
  // The slot is only read in this direction.
  const auto slot = [&] { return const_cast<char*>(reader.slot()); };
  for (std::int64_t tile = blockIdx.x; (tile << pull.tile_shift) < pull.table.bytes; tile += gridDim.x) {
    const std::int64_t begin = tile << pull.tile_shift;
    const std::int64_t end = min(begin + (std::int64_t{1} << pull.tile_shift), pull.table.bytes);
    if (!reader.arrived(begin, end)) break;
    peer_copy_tile<PeerDirection::kOutOfSlot>(pull.table, slot, begin, end);
  }
  reader.acknowledge();
}

}  // namespace cfg_parallel
