// The part of CUDA C++ that the kernels of the peer transport use, on CPU threads: one std::thread for each CUDA
// thread.
#pragma once

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <deque>
#include <thread>
#include <vector>

#define __device__
#define __global__ static
#define __grid_constant__
#define __forceinline__ inline
#define __launch_bounds__(threads)

using std::max;
using std::min;
using cudaStream_t = void*;
struct alignas(16) uint4 {
  std::uint32_t x, y, z, w;
};
struct Index {
  unsigned x;
};
inline thread_local Index threadIdx, blockIdx, blockDim, gridDim;

// A barrier for the threads of a block, and the reduction of __syncthreads_or.
struct Block {
  explicit Block(unsigned threads) { pthread_barrier_init(&barrier, nullptr, threads); }
  ~Block() { pthread_barrier_destroy(&barrier); }
  pthread_barrier_t barrier;
  std::atomic<int> any{0};
};
inline thread_local Block* this_block;

inline void __syncthreads() { pthread_barrier_wait(&this_block->barrier); }
inline int __syncthreads_or(int value) {
  if (value != 0) this_block->any.store(1, std::memory_order_relaxed);
  __syncthreads();
  const int any = this_block->any.load(std::memory_order_relaxed);
  __syncthreads();
  if (threadIdx.x == 0) this_block->any.store(0, std::memory_order_relaxed);
  __syncthreads();
  return any;
}

// Runs a kernel to its end, as a stream does.
template <typename Kernel, typename Params>
void launch(Kernel kernel, unsigned grid, unsigned threads, const Params& params) {
  std::deque<Block> blocks;
  std::vector<std::thread> running;
  for (unsigned b = 0; b < grid; ++b) {
    Block* block = &blocks.emplace_back(threads);
    for (unsigned t = 0; t < threads; ++t) {
      running.emplace_back([&, block, b, t] {
        threadIdx = {t}, blockIdx = {b}, blockDim = {threads}, gridDim = {grid};
        this_block = block;
        kernel(params);
      });
    }
  }
  for (std::thread& thread : running) thread.join();
}
