// Programs: straight-line elementwise arithmetic in one launch, whatever its length. python/cfg_parallel/program.py
// says what a program means; the two enums and the limits are the same there.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <string>
#include <vector>

#include "peer.h"

namespace cfg_parallel {

enum class DType : std::uint8_t { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

enum class Op : std::uint8_t { kAdd, kSub, kMul, kDiv, kFma, kNeg, kAbs, kSqrt, kClamp, kRound, kNorm };

constexpr int kMaxInputs = 12;
constexpr int kMaxOutputs = 4;
constexpr int kMaxInstructions = 64;
constexpr int kMaxScalars = 32;
constexpr int kMaxDims = 6;  // after neighbours that lie in memory as one have been merged
constexpr int kRegisters = 20;
constexpr std::uint8_t kScalar = 0x80;  // an operand of kScalar + k is scalar k; a smaller one is a register

struct Instruction {
  Op op;
  std::uint8_t dst;
  std::uint8_t a, b, c;
  DType round;  // what the result is rounded to before the next instruction sees it

  bool operator==(const Instruction&) const = default;
};

// How one tensor is walked through; strides are in elements, the last dimension first.
struct Operand {
  DType dtype;
  std::vector<std::int64_t> strides;
};

// Input `input` lies `offset` bytes into the next piece that a peer pushes, or has pushed. It is copied to `keep`, laid
// out alike, unless that is null: the piece's place is used again.
struct PeerInput {
  int input;
  std::int64_t offset;
  void* keep;
  PeerWait wait;
};

// A program for tensors of one shape and layout: what does not change from launch to launch.
class Program {
 public:
  // Dimensions as PyTorch orders them, the last one fastest. Raises Error for what is over the limits.
  Program(std::vector<std::int64_t> shape, std::vector<Operand> inputs, std::vector<Operand> outputs,
          std::vector<Instruction> code, std::vector<std::uint8_t> stores);

  // Enqueue on `stream` of the current device. An output may be the memory of an input, if both have the same layout.
  void launch(const std::vector<const void*>& inputs, const std::vector<void*>& outputs,
              const std::vector<float>& scalars, const PeerInput* peer, cudaStream_t stream) const;

  // The kernel compiled for exactly this code, such as "cfg bfloat16"; empty when the general kernel runs it.
  std::string specialization() const;

 private:
  void merge_dimensions();
  bool vectorizes(int vec, const std::vector<const void*>& inputs, const std::vector<void*>& outputs,
                  const PeerInput* peer) const;

  std::vector<std::int64_t> shape_;  // the last dimension first
  std::vector<Operand> inputs_, outputs_;
  std::vector<Instruction> code_;
  std::vector<std::uint8_t> stores_;
  int lanes_ = 0;  // neighbouring threads that hold a row of a norm; 0 when there is none
  int specialization_ = -1;
};

// The programs that have a kernel of their own: name, input dtypes, output dtypes, code, stores.
struct Specialization {
  std::string name;
  std::vector<DType> inputs, outputs;
  std::vector<Instruction> code;
  std::vector<std::uint8_t> stores;
};
std::vector<Specialization> specializations();

}  // namespace cfg_parallel
