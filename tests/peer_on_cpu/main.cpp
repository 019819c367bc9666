// The kernels of csrc/peer_kernels.cuh as CPU threads: what they copy, and, under ThreadSanitizer, that every access is
// ordered as peer_wait.cuh says. Prints "ok"; otherwise says what was wrong and exits with 1.
#include <cuda_runtime.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "peer_kernels.cuh"

using namespace cfg_parallel;

namespace {

constexpr int kShift = 8;
constexpr std::int64_t kSlot = 2048;
constexpr std::int64_t kChunks = kSlot >> kShift;

void expect(bool ok, const char* what) {
  if (ok) return;
  std::printf("wrong: %s\n", what);
  std::exit(1);
}

// As a kernel that combines reads a piece: it says so before it stores what it has made of it.
struct PeerRead {
  PeerWait wait;
  std::int64_t bytes;
  char* to;
};
void read_kernel(const PeerRead& read) {
  const PeerReader reader(read.wait);
  const std::int64_t tile = 16 * blockDim.x;
  const std::int64_t stride = gridDim.x * tile;
  bool has_read = false;
  for (std::int64_t begin = blockIdx.x * tile; begin < read.bytes; begin += stride) {
    if (!reader.arrived(begin, std::min(begin + tile, read.bytes))) {
      has_read = false;
      break;
    }
    const std::int64_t mine = begin + 16 * threadIdx.x;
    uint4 value{};
    if (mine < read.bytes) value = peer_load<16>(reader.slot() + mine);
    has_read = begin + stride >= read.bytes;
    if (has_read) reader.acknowledge();
    if (mine < read.bytes) peer_store<16>(read.to + mine, value);
  }
  if (!has_read) reader.acknowledge();
}

// What PeerEndpoint allocates, in ordinary memory.
struct Side {
  std::uint64_t consumed = 0, failed = 0, looked = 0;
  std::uint32_t peer_failed = 0, abort = 0, push_failure = 0, pull_failure = 0;
  PeerCounter pushed{}, pulled{};
  std::uint64_t flags[kPeerSlots * kChunks] = {};
  alignas(64) char slots[kPeerSlots * kSlot] = {};
  std::uint64_t timeout_ns = 60'000'000'000;

  PeerLimits limits(Side& peer, std::uint32_t* failure) {
    return {&abort, &looked, failure, &failed, &peer_failed, &peer.peer_failed, timeout_ns};
  }
  // No more blocks than tiles, as PeerEndpoint has it.
  static unsigned blocks(unsigned grid, const PeerTable& table, int tile_shift) {
    return std::min(grid, static_cast<unsigned>((table.bytes - 1) >> tile_shift) + 1);
  }
  void push(Side& peer, const PeerTable& table, unsigned grid, unsigned threads) {
    const PeerCredit credit{limits(peer, &push_failure), &pushed, &consumed};
    const int tile = kShift + static_cast<int>(grid % 3);  // one, two or four chunks
    launch(peer_push_kernel, blocks(grid, table, tile), threads,
           PeerPush{credit, peer.flags, peer.slots, kSlot, kShift, tile, table});
  }
  void gate(Side& peer) { launch(peer_gate_kernel, 1, 1, PeerCredit{limits(peer, &push_failure), &pushed, &consumed}); }
  PeerWait wait(Side& peer) {
    return {limits(peer, &pull_failure), &pulled, flags, slots, &peer.consumed, kSlot, kShift};
  }
  void pull(Side& peer, const PeerTable& table, unsigned grid, unsigned threads) {
    const int tile = kShift + static_cast<int>(grid % 2);
    launch(peer_pull_kernel, blocks(grid, table, tile), threads, PeerPull{wait(peer), tile, table});
  }
  void read(Side& peer, const PeerTable& table, unsigned grid, unsigned threads) {
    alignas(16) char piece[kSlot];
    launch(read_kernel, grid, threads, PeerRead{wait(peer), table.bytes, piece});
    for (int i = 0; i < table.count; ++i) {
      const PeerSegment& segment = table.segments[i];
      std::memcpy(segment.data, piece + segment.offset, static_cast<std::size_t>(segment.bytes));
    }
  }
};

// Bytes of several tensors, each at any alignment, and where they lie in the slot.
struct Message {
  std::vector<std::vector<char>> memory;
  PeerTable table{};

  Message(unsigned seed, unsigned values) {
    std::mt19937 layout(seed), random(values);
    const int count = 1 + static_cast<int>(layout() % 4);
    for (int i = 0; i < count; ++i) {
      const std::int64_t offset = (table.bytes + 255) / 256 * 256 + (layout() % 8 == 0 ? 256 : 0);
      if (offset >= kSlot) break;
      std::int64_t bytes = 1 + layout() % 700;
      bytes = std::min(bytes, kSlot - offset);
      const unsigned shifts[] = {0, 4, 1, 2, 8};
      const unsigned shift = shifts[(layout() + values) % 5];  // the two sides may differ in this
      memory.emplace_back(static_cast<std::size_t>(bytes) + 64);
      char* data = memory.back().data();
      data += (16 - reinterpret_cast<std::uintptr_t>(data) % 16) % 16 + shift;
      for (std::int64_t b = 0; b < bytes; ++b) data[b] = static_cast<char>(random());
      table.segments[table.count++] = {data, bytes, offset};
      table.bytes = offset + bytes;
    }
  }
  bool same_bytes(const Message& other) const {
    bool same = table.count == other.table.count;
    for (int i = 0; same && i < table.count; ++i) {
      const PeerSegment &a = table.segments[i], &b = other.table.segments[i];
      same = a.bytes == b.bytes && a.offset == b.offset &&
             std::memcmp(a.data, b.data, static_cast<std::size_t>(a.bytes)) == 0;
    }
    return same;
  }
};

void nap(std::mt19937& random) {
  if (random() % 3 == 0) std::this_thread::sleep_for(std::chrono::microseconds(random() % 2000));
}

// Both directions at once, with either side late at random.
void exchange(unsigned seed, int count) {
  auto a = std::make_unique<Side>(), b = std::make_unique<Side>();
  auto send = [&](Side& from, Side& to, unsigned stream_seed) {
    std::mt19937 random(stream_seed + 1);
    for (int i = 0; i < count; ++i) {
      nap(random);
      if (random() % 4 == 0) from.gate(to);
      Message message(stream_seed + 7 * i, i);
      from.push(to, message.table, 1 + random() % 3, 4);
      for (int s = 0; s < message.table.count; ++s) {  // the stream has passed it: it may be overwritten
        std::memset(message.table.segments[s].data, 0x55, static_cast<std::size_t>(message.table.segments[s].bytes));
      }
    }
  };
  auto receive = [&](Side& at, Side& from, unsigned stream_seed) {
    std::mt19937 random(stream_seed + 2);
    for (int i = 0; i < count; ++i) {
      nap(random);
      const Message sent(stream_seed + 7 * i, i);
      const Message received(stream_seed + 7 * i, i + 12345);
      if (random() % 2 == 0) {
        at.pull(from, received.table, 1 + random() % 3, 4);
      } else {
        at.read(from, received.table, 1 + random() % 3, 4);
      }
      expect(received.same_bytes(sent), "bytes of a message");
    }
  };
  std::thread threads[] = {std::thread([&] { send(*a, *b, seed); }), std::thread([&] { receive(*b, *a, seed); }),
                           std::thread([&] { send(*b, *a, seed + 1000); }),
                           std::thread([&] { receive(*a, *b, seed + 1000); })};
  for (std::thread& thread : threads) thread.join();
  expect(a->failed == 0 && b->failed == 0 && a->push_failure == 0 && b->pull_failure == 0, "no failure");
  expect(a->pushed.epoch == static_cast<std::uint64_t>(count) && a->pushed.blocks_done == 0, "the sender's counter");
  expect(b->pulled.epoch == static_cast<std::uint64_t>(count) && b->pulled.blocks_done == 0, "the receiver's counter");
}

// Waits that nobody answers end, say so, and nothing that follows looks as if it had been sent.
void failures() {
  const Message message(1, 1);
  {
    Side a, b;
    b.timeout_ns = 50'000'000;
    b.pull(a, message.table, 2, 4);
    expect(b.pull_failure == static_cast<std::uint32_t>(PeerFailure::kTimeout), "a pull that timed out");
    expect(b.failed == 1 && a.peer_failed == 1, "the peer is told");
    b.push(a, message.table, 2, 4);
    expect(b.push_failure == static_cast<std::uint32_t>(PeerFailure::kBroken), "a push after a failure");
    for (std::uint64_t flag : a.flags) expect(flag == 0, "no flag is set after a failure");
    a.pull(b, message.table, 2, 4);
    expect(a.pull_failure == static_cast<std::uint32_t>(PeerFailure::kPeerFailed), "the peer's pull ends too");
  }
  {
    Side a, b;
    a.timeout_ns = 50'000'000;
    for (int i = 0; i < 3; ++i) a.push(b, message.table, 2, 4);
    expect(a.push_failure == static_cast<std::uint32_t>(PeerFailure::kTimeout), "a third push without credit");
    for (std::uint64_t flag : b.flags) expect(flag <= 2, "an unread slot is not overwritten");
  }
  {
    Side a, b;
    std::thread other([&] {
      std::this_thread::sleep_for(std::chrono::milliseconds(50));
      std::atomic_ref(b.abort).store(1);
    });
    b.pull(a, message.table, 3, 4);
    other.join();
    expect(b.pull_failure == static_cast<std::uint32_t>(PeerFailure::kAborted), "an aborted pull");
    expect(a.peer_failed == 0, "who is gone is not told");
    Message received(1, 2);
    a.push(b, message.table, 1, 4);
    b.pulled = {};
    b.pull(a, received.table, 1, 4);
    expect(received.same_bytes(message), "what has landed is read even then");
  }
}

}  // namespace

int main(int argc, char** argv) {
  const int rounds = argc > 1 ? std::atoi(argv[1]) : 3;
  failures();
  for (int round = 0; round < rounds; ++round) exchange(static_cast<unsigned>(100 * round), 40);
  std::puts("ok");
}
