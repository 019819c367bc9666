// Classifier-free guidance, out = uncond + scale * (cond - uncond). Ho & Salimans 2022, with scale = 1 + w.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace cfg_parallel {

enum class DType : int { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

enum class Numerics : int {
  kExact = 0,  // rounds to the dtype after every operation: the bits of the eager PyTorch expression
  kFused = 1,  // fp32 throughout, one rounding at the end: closer to the true value, other bits
};

// Three buffers of `numel` values on the current device, any alignment of at least the element's. `out` may be the
// same buffer as `cond` or `uncond`; a partial overlap is not allowed.
struct CombineParams {
  const void* cond;
  const void* uncond;
  void* out;
  std::int64_t numel;
  float scale;
  DType dtype;
  Numerics numerics;
};

void launch_combine(const CombineParams& params, cudaStream_t stream);

}  // namespace cfg_parallel
