// The parameters of a program's kernel, as the host and the kernel see them. Also compiled at run time.
#pragma once

#include <cstdint>

#include "peer_wait.h"

namespace cfg_parallel {

constexpr int kProgramThreads = 256;  // in a block
// Of a kernel that waits for a peer: it must leave room for others (peer_wait.cuh), so it takes at most half of an SM's
// registers, which kWaitingBlocksPerSm * 2 as the launch bound sees to.
constexpr int kWaitingBlocksPerSm = 2;

// Program::launch (program.cpp) writes the same fields in the same order, without knowing the sizes at compile time.
template <typename Code>
struct ProgramArgs {
  const void* inputs[Code::kInputs];
  void* outputs[Code::kOutputs];
  std::int64_t numel;
  std::int64_t sizes[Code::kDims];                                    // the fastest dimension first
  std::int64_t strides[Code::kInputs + Code::kOutputs][Code::kDims];  // in elements
  float scalars[Code::kScalars];
};

// Of a program whose outputs are statistics of samples. A sample is blockIdx.y; gridDim.x blocks share it.
struct StatisticsArgs {
  double* partials;         // scratch: three for each output, block and sample
  std::uint32_t* tickets;   // 0 for each sample; left so
  std::int64_t per_sample;  // elements
};

// An input that a peer pushes, or has pushed: `offset` bytes into its next piece.
struct ArrivingInput {
  PeerWait wait;
  std::int64_t offset;
  std::int64_t bytes;
  void* keep;  // where a copy goes, laid out alike, for the piece's place is used again; null for none
};

}  // namespace cfg_parallel
