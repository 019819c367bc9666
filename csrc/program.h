// Programs: straight-line elementwise arithmetic in one launch, whatever its length. python/cfg_parallel/program.py
// says what a program means, codegen.py writes its kernel, and what is here launches it.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "program_args.h"

namespace cfg_parallel {

// A compiled kernel on one device, for as long as the process lives.
class Kernel {
 public:
  Kernel(const std::string& image, const std::string& name, int device);
  CUfunction function() const { return function_; }

 private:
  CUfunction function_ = nullptr;
};

// Which kernel of a program a launch needs.
struct Variant {
  int device;
  int width;     // elements that a thread takes at once
  int arriving;  // the input that it waits for; -1 for none

  auto operator<=>(const Variant&) const = default;
};

// A program for tensors of one shape and layout: what does not change from launch to launch.
class Program {
 public:
  // `sizes` of the merged dimensions, the fastest first; `strides` of each input and then of each output, in elements;
  // `width`: of vectors, for addresses that are multiples of `alignments` (inputs, then outputs).
  Program(const std::vector<std::int64_t>& sizes, const std::vector<std::vector<std::int64_t>>& strides, int num_inputs,
          int num_scalars, int width, std::vector<int> alignments);

  // Enqueue on `stream`. An output may be the memory of an input, if both have the same layout. Without the kernel that
  // this needs nothing is done, and which one is returned. `input` is the arriving one's number. With `statistics`,
  // `blocks` share a sample.
  std::optional<Variant> launch(const std::vector<std::uintptr_t>& inputs, const std::vector<std::uintptr_t>& outputs,
                                const std::vector<float>& scalars, int device, int input, const ArrivingInput* arriving,
                                const StatisticsArgs* statistics, int blocks, cudaStream_t stream) const;
  void add(const Variant& variant, std::shared_ptr<Kernel> kernel);

 private:
  std::shared_ptr<Kernel> find(const Variant& variant) const;

  int num_inputs_, num_outputs_, num_scalars_;
  std::int64_t numel_;
  int width_;
  std::vector<int> alignments_;
  std::vector<std::uint64_t> args_;  // ProgramArgs, without addresses and scalars
  mutable std::mutex mutex_;
  std::map<Variant, std::shared_ptr<Kernel>> kernels_;
};

}  // namespace cfg_parallel
