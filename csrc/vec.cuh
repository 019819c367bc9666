// Packed loads and stores, and the roundings between a storage type and fp32.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace cfg_parallel {

// kVec values that move together; the alignment is what lets the compiler emit 16-byte instructions.
template <typename T, int kVec>
struct alignas(sizeof(T) * kVec < 16 ? sizeof(T) * kVec : 16) Vec {
  T values[kVec];
};

template <int kVec, typename T>
__device__ __forceinline__ Vec<T, kVec> load_vec(const T* base, std::int64_t index) {
  return reinterpret_cast<const Vec<T, kVec>*>(base)[index];
}

template <int kVec, typename T>
__device__ __forceinline__ void store_vec(T* base, std::int64_t index, const Vec<T, kVec>& vec) {
  reinterpret_cast<Vec<T, kVec>*>(base)[index] = vec;
}

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ __half from_float<__half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

// The value that survives a store as T and a load back: where eager PyTorch puts an intermediate tensor.
template <typename T>
__device__ __forceinline__ float round_to(float x) {
  return to_float(from_float<T>(x));
}

}  // namespace cfg_parallel
