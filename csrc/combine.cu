#include <algorithm>
#include <string>

#include "check.h"
#include "combine.h"
#include "vec.cuh"

namespace cfg_parallel {
namespace {

constexpr int kThreads = 256;
// Fills the 2048 thread slots of an SM. Each thread has two 16-byte loads in flight, 64 KiB per SM, which is more
// than latency times bandwidth asks for on H200 (about 25 KiB per SM at 4.8 TB/s and 700 ns).
constexpr int kBlocksPerSm = 8;

// The _rn intrinsics are there because the compiler never contracts them: `n + s * d` written with operators would
// become one fused multiply-add, which rounds once where eager PyTorch rounds twice.
template <typename T, Numerics kNumerics>
__device__ __forceinline__ T guide(T cond, T uncond, float scale) {
  const float p = to_float(cond);
  const float n = to_float(uncond);
  if constexpr (kNumerics == Numerics::kFused) {
    return from_float<T>(__fmaf_rn(scale, __fsub_rn(p, n), n));
  } else {
    const float difference = round_to<T>(__fsub_rn(p, n));
    const float scaled = round_to<T>(__fmul_rn(scale, difference));
    return from_float<T>(__fadd_rn(n, scaled));
  }
}

// A thread reads its elements before it writes them, so `out` may be an input; hence no __restrict__ here.
template <typename T, int kVec, Numerics kNumerics>
__global__ void __launch_bounds__(kThreads)
    combine_kernel(const T* cond, const T* uncond, T* out, std::int64_t numel, float scale) {
  const std::int64_t thread = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const std::int64_t num_threads = static_cast<std::int64_t>(gridDim.x) * kThreads;
  const std::int64_t num_vecs = numel / kVec;
  for (std::int64_t i = thread; i < num_vecs; i += num_threads) {
    const Vec<T, kVec> p = load_vec<kVec>(cond, i);
    const Vec<T, kVec> n = load_vec<kVec>(uncond, i);
    Vec<T, kVec> result;
#pragma unroll
    for (int j = 0; j < kVec; ++j) {
      result.values[j] = guide<T, kNumerics>(p.values[j], n.values[j], scale);
    }
    store_vec<kVec>(out, i, result);
  }
  // At most kVec - 1 elements are left: the first threads take one each.
  const std::int64_t tail = num_vecs * kVec + thread;
  if (tail < numel) out[tail] = guide<T, kNumerics>(cond[tail], uncond[tail], scale);
}

bool is_aligned(const void* pointer, std::size_t alignment) {
  return reinterpret_cast<std::uintptr_t>(pointer) % alignment == 0;
}

template <typename T, int kVec, Numerics kNumerics>
void launch(const CombineParams& params, cudaStream_t stream) {
  int device = 0;
  int num_sms = 0;
  check(cudaGetDevice(&device));
  check(cudaDeviceGetAttribute(&num_sms, cudaDevAttrMultiProcessorCount, device));
  const std::int64_t num_blocks = (params.numel / kVec + kThreads - 1) / kThreads;
  const auto grid =
      static_cast<unsigned>(std::clamp<std::int64_t>(num_blocks, 1, static_cast<std::int64_t>(kBlocksPerSm) * num_sms));
  combine_kernel<T, kVec, kNumerics>
      <<<grid, kThreads, 0, stream>>>(static_cast<const T*>(params.cond), static_cast<const T*>(params.uncond),
                                      static_cast<T*>(params.out), params.numel, params.scale);
  check(cudaGetLastError());
}

template <typename T>
void dispatch(const CombineParams& params, cudaStream_t stream) {
  constexpr int kVec = 16 / sizeof(T);
  const bool exact = params.numerics == Numerics::kExact;
  // A slice such as x[1:] starts off the 16-byte grid; then every element goes alone.
  if (is_aligned(params.cond, 16) && is_aligned(params.uncond, 16) && is_aligned(params.out, 16)) {
    exact ? launch<T, kVec, Numerics::kExact>(params, stream) : launch<T, kVec, Numerics::kFused>(params, stream);
  } else {
    exact ? launch<T, 1, Numerics::kExact>(params, stream) : launch<T, 1, Numerics::kFused>(params, stream);
  }
}

}  // namespace

void launch_combine(const CombineParams& params, cudaStream_t stream) {
  if (params.numel < 0) {
    throw Error("Expected numel >= 0, but got " + std::to_string(params.numel));
  }
  if (params.numel == 0) return;  // a launch with no block is an error in CUDA
  switch (params.dtype) {
    case DType::kFloat32:
      return dispatch<float>(params, stream);
    case DType::kFloat16:
      return dispatch<__half>(params, stream);
    case DType::kBFloat16:
      return dispatch<__nv_bfloat16>(params, stream);
  }
  throw Error("Expected a DType, but got " + std::to_string(static_cast<int>(params.dtype)));
}

}  // namespace cfg_parallel
