// The kernels of the peer transport: push a piece into the peer's slot, copy a piece out of our own.
#pragma once

#include "peer.h"
#include "peer_wait.cuh"

namespace cfg_parallel {

constexpr int kPeerThreads = 256;
// 16-byte loads that a thread has in flight: 16 KiB for a block. NVLink's 390 GB/s over some 1 us from HBM to the
// peer's L2 ask for 400 KB in flight on the whole GPU.
constexpr int kPeerUnroll = 4;

// By value, in the constant bank.
struct PeerTable {
  PeerSegment segments[kPeerMaxSegments];  // by offset
  int count;
  std::int64_t bytes;  // of the piece: the end of the last segment
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
  PeerTable table;
};

struct PeerPull {
  PeerWait wait;
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

// By a whole block.
template <int kFromWidth, int kToWidth>
__device__ __forceinline__ void peer_copy(char* to, const char* from, int bytes) {
  const int vecs = bytes / 16;
  const int threads = static_cast<int>(blockDim.x);
  const int thread = static_cast<int>(threadIdx.x);
  for (int first = thread; first < vecs; first += kPeerUnroll * threads) {
    uint4 held[kPeerUnroll];
#pragma unroll
    for (int u = 0; u < kPeerUnroll; ++u) {
      const int i = first + u * threads;
      if (i < vecs) held[u] = peer_load<kFromWidth>(from + 16 * i);
    }
#pragma unroll
    for (int u = 0; u < kPeerUnroll; ++u) {
      const int i = first + u * threads;
      if (i < vecs) peer_store<kToWidth>(to + 16 * i, held[u]);
    }
  }
  for (int i = 16 * vecs + thread; i < bytes; i += threads) to[i] = from[i];
}

enum class PeerDirection { kIntoSlot, kOutOfSlot };

// What lies in bytes [begin, end) of the piece, by a whole block.
template <PeerDirection kDirection>
__device__ inline void peer_copy_chunk(const PeerTable& table, char* slot, std::int64_t begin, std::int64_t end) {
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
    const std::int64_t from = max(begin, segment.offset);
    const std::int64_t to = min(end, segment.offset + segment.bytes);
    const int bytes = static_cast<int>(to - from);
    char* data = static_cast<char*>(segment.data) + (from - segment.offset);
    char* inside = slot + from;  // 16-byte aligned: offsets and chunks are
    const auto address = reinterpret_cast<std::uintptr_t>(data);
    if constexpr (kDirection == PeerDirection::kIntoSlot) {
      if (address % 16 == 0) {
        peer_copy<16, 16>(inside, data, bytes);
      } else if (address % 4 == 0) {
        peer_copy<4, 16>(inside, data, bytes);
      } else {
        peer_copy<1, 16>(inside, data, bytes);
      }
    } else {
      if (address % 16 == 0) {
        peer_copy<16, 16>(data, inside, bytes);
      } else if (address % 4 == 0) {
        peer_copy<16, 4>(data, inside, bytes);
      } else {
        peer_copy<16, 1>(data, inside, bytes);
      }
    }
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

__global__ void __launch_bounds__(kPeerThreads) peer_push_kernel(const __grid_constant__ PeerPush push) {
  const std::uint64_t epoch = ld_relaxed_gpu(&push.credit.counter->epoch) + 1;
  const int index = static_cast<int>(epoch % kPeerSlots);
  const bool stop = threadIdx.x == 0 && !peer_has_credit(push.credit, epoch);
  if (__syncthreads_or(stop) == 0) {
    char* slot = push.slots + index * push.slot_bytes;
    std::uint64_t* flags = push.flags + index * (push.slot_bytes >> push.chunk_shift);
    for (std::int64_t chunk = blockIdx.x; (chunk << push.chunk_shift) < push.table.bytes; chunk += gridDim.x) {
      const std::int64_t begin = chunk << push.chunk_shift;
      const std::int64_t end = min(begin + (std::int64_t{1} << push.chunk_shift), push.table.bytes);
      peer_copy_chunk<PeerDirection::kIntoSlot>(push.table, slot, begin, end);
      __syncthreads();
      if (threadIdx.x == 0) st_release_sys(flags + chunk, epoch);
    }
  }
  if (threadIdx.x == 0) peer_last_block(push.credit.counter, epoch);
}

__global__ void __launch_bounds__(kPeerThreads) peer_pull_kernel(const __grid_constant__ PeerPull pull) {
  const PeerReader reader(pull.wait);
  const int shift = pull.wait.chunk_shift;
  for (std::int64_t chunk = blockIdx.x; (chunk << shift) < pull.table.bytes; chunk += gridDim.x) {
    const std::int64_t begin = chunk << shift;
    const std::int64_t end = min(begin + (std::int64_t{1} << shift), pull.table.bytes);
    if (!reader.arrived(begin, end)) break;
    // The slot is only read in this direction.
    peer_copy_chunk<PeerDirection::kOutOfSlot>(pull.table, const_cast<char*>(reader.slot()), begin, end);
  }
  reader.acknowledge();
}

}  // namespace cfg_parallel
