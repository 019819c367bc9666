#include "program.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "check.h"
#include "device_guard.h"

namespace cfg_parallel {

Kernel::Kernel(const std::string& image, const std::string& name, int device) {
  const DeviceGuard guard(device);
  CUmodule module = nullptr;
  check(driver().load_module(&module, image.data()));
  check(driver().get_function(&function_, module, name.c_str()));
}

Program::Program(const std::vector<std::int64_t>& sizes, const std::vector<std::vector<std::int64_t>>& strides,
                 int num_inputs, int num_scalars, int width, std::vector<int> alignments)
    : num_inputs_(num_inputs),
      num_outputs_(static_cast<int>(strides.size()) - num_inputs),
      num_scalars_(num_scalars),
      numel_(1),
      width_(width),
      alignments_(std::move(alignments)) {
  if (num_inputs < 1 || num_outputs_ < 1 || sizes.empty() || width < 1 || alignments_.size() != strides.size()) {
    throw Error("Expected a program with inputs, outputs, dimensions and an alignment for each tensor");
  }
  for (const std::int64_t size : sizes) numel_ *= size;
  args_.resize(strides.size());  // the addresses
  args_.push_back(static_cast<std::uint64_t>(numel_));
  for (const std::int64_t size : sizes) args_.push_back(static_cast<std::uint64_t>(size));
  for (const std::vector<std::int64_t>& row : strides) {
    if (row.size() != sizes.size()) throw Error("Expected a stride for each dimension");
    for (const std::int64_t stride : row) args_.push_back(static_cast<std::uint64_t>(stride));
  }
}

std::shared_ptr<Kernel> Program::find(const Variant& variant) const {
  const std::lock_guard lock(mutex_);
  const auto found = kernels_.find(variant);
  return found == kernels_.end() ? nullptr : found->second;
}

void Program::add(const Variant& variant, std::shared_ptr<Kernel> kernel) {
  const std::lock_guard lock(mutex_);
  kernels_[variant] = std::move(kernel);
}

std::optional<Variant> Program::launch(const std::vector<std::uintptr_t>& inputs,
                                       const std::vector<std::uintptr_t>& outputs, const std::vector<float>& scalars,
                                       int device, int input, const ArrivingInput* arriving,
                                       const StatisticsArgs* statistics, int blocks, cudaStream_t stream) const {
  if (static_cast<int>(inputs.size()) != num_inputs_ || static_cast<int>(outputs.size()) != num_outputs_ ||
      static_cast<int>(scalars.size()) != num_scalars_) {
    throw Error("Expected " + std::to_string(num_inputs_) + " inputs, " + std::to_string(num_outputs_) +
                " outputs and " + std::to_string(num_scalars_) + " scalars, but got " + std::to_string(inputs.size()) +
                ", " + std::to_string(outputs.size()) + " and " + std::to_string(scalars.size()));
  }
  if (numel_ == 0 && arriving == nullptr) return std::nullopt;  // a peer's piece must be acknowledged whatever it holds
  std::vector<std::uint64_t> args = args_;
  std::ranges::copy(outputs, std::ranges::copy(inputs, args.begin()).out);
  bool aligned = true;
  for (std::size_t k = 0; k < alignments_.size(); ++k) {
    // What lies in a slot is aligned; `keep` is written where it is read.
    const bool in_slot = arriving != nullptr && static_cast<int>(k) == input;
    const std::uint64_t address = in_slot ? reinterpret_cast<std::uintptr_t>(arriving->keep) : args[k];
    aligned &= address % static_cast<std::uint64_t>(alignments_[k]) == 0;
  }
  const int width = aligned ? width_ : 1;
  const Variant variant{.device = device, .width = width, .arriving = arriving == nullptr ? -1 : input};
  const std::shared_ptr<Kernel> kernel = find(variant);
  if (kernel == nullptr) return variant;
  const std::size_t before = args.size();
  args.resize(before +
              std::max<std::size_t>((scalars.size() + 1) / 2, 1));  // a program without scalars has room for one
  if (!scalars.empty()) std::memcpy(&args[before], scalars.data(), scalars.size() * sizeof(float));
  const std::int64_t units = numel_ / width + numel_ % width;
  std::int64_t grid = std::max<std::int64_t>((units + kProgramThreads - 1) / kProgramThreads, 1);
  std::int64_t samples = 1;
  const DeviceGuard guard(device);
  if (arriving != nullptr) {
    int num_sms = 0;
    check(cudaDeviceGetAttribute(&num_sms, cudaDevAttrMultiProcessorCount, device));
    grid = std::min<std::int64_t>(grid, kWaitingBlocksPerSm * num_sms);
  }
  void* params[] = {args.data(), const_cast<ArrivingInput*>(arriving)};
  if (statistics != nullptr) {
    params[1] = const_cast<StatisticsArgs*>(statistics);
    grid = blocks;
    samples = numel_ / statistics->per_sample;
  }
  check(driver().launch_kernel(kernel->function(), static_cast<unsigned>(grid), static_cast<unsigned>(samples), 1,
                               kProgramThreads, 1, 1, 0, stream, params, nullptr));
  return std::nullopt;
}

}  // namespace cfg_parallel
