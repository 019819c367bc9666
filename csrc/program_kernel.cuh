// What python/cfg_parallel/codegen.py builds kernels of: each op of a program is a call of one of the functions here.
// Compiled at run time, together with the program's own code, for the GPU at hand: nvrtc knows no standard headers but
// the <cstdint> that it is given.
//
// A kernel takes kVec neighbours of the fastest dimension at a time. A value is `Values<n>`, or a float where all n
// are known to be equal: then it is computed once.
#pragma once

#include <cstdint>

#include "peer_wait.cuh"
#include "program_args.h"

namespace cfg_parallel {

struct fp16 {
  std::uint16_t bits;
};
struct bf16 {
  std::uint16_t bits;
};

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(fp16 x) {
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(x.bits));
  return result;
}
__device__ __forceinline__ float to_float(bf16 x) { return __uint_as_float(static_cast<std::uint32_t>(x.bits) << 16); }

template <typename T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ fp16 from_float<fp16>(float x) {
  fp16 result;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result.bits) : "f"(x));
  return result;
}
template <>
__device__ __forceinline__ bf16 from_float<bf16>(float x) {
  bf16 result;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result.bits) : "f"(x));
  return result;
}

template <int n>
struct Values {
  float x[n];
};

template <typename T>
struct WidthOf {
  static constexpr int kWidth = 0;
};
template <int n>
struct WidthOf<Values<n>> {
  static constexpr int kWidth = n;
};

__device__ __forceinline__ float at(float value, int) { return value; }
template <int n>
__device__ __forceinline__ float at(const Values<n>& values, int j) {
  return values.x[j];
}

// f of each element; a float when every argument is one.
template <typename F, typename... Args>
__device__ __forceinline__ auto each(F f, const Args&... args) {
  constexpr int n = (0 | ... | WidthOf<Args>::kWidth);
  if constexpr (n == 0) {
    return f(args...);
  } else {
    Values<n> result;
#pragma unroll
    for (int j = 0; j < n; ++j) result.x[j] = f(at(args, j)...);
    return result;
  }
}

// The _rn intrinsics are there because the compiler never contracts them: two roundings stay two.
template <typename A, typename B>
__device__ __forceinline__ auto add(const A& a, const B& b) {
  return each([](float x, float y) { return __fadd_rn(x, y); }, a, b);
}
template <typename A, typename B>
__device__ __forceinline__ auto sub(const A& a, const B& b) {
  return each([](float x, float y) { return __fsub_rn(x, y); }, a, b);
}
template <typename A, typename B>
__device__ __forceinline__ auto mul(const A& a, const B& b) {
  return each([](float x, float y) { return __fmul_rn(x, y); }, a, b);
}
template <typename A, typename B>
__device__ __forceinline__ auto div(const A& a, const B& b) {
  return each([](float x, float y) { return __fdiv_rn(x, y); }, a, b);
}
template <typename A, typename B, typename C>
__device__ __forceinline__ auto fma(const A& a, const B& b, const C& c) {
  return each([](float x, float y, float z) { return __fmaf_rn(x, y, z); }, a, b, c);
}
template <typename A>
__device__ __forceinline__ auto neg(const A& a) {
  return each([](float x) { return -x; }, a);
}
template <typename A>
__device__ __forceinline__ auto abs(const A& a) {
  return each([](float x) { return fabsf(x); }, a);
}
template <typename A>
__device__ __forceinline__ auto sqrt(const A& a) {
  return each([](float x) { return __fsqrt_rn(x); }, a);
}
// min(max(a, low), high); a NaN anywhere gives NaN.
template <typename A, typename Low, typename High>
__device__ __forceinline__ auto clamp(const A& a, const Low& low, const High& high) {
  return each(
      [](float x, float y, float z) {
        const float inside = fminf(fmaxf(x, y), z);
        return x != x ? x : y != y ? y : z != z ? z : inside;
      },
      a, low, high);
}
// What survives a store as T and a load: where eager PyTorch puts an intermediate tensor.
template <typename T, typename A>
__device__ __forceinline__ auto rounded(const A& a) {
  return each([](float x) { return to_float(from_float<T>(x)); }, a);
}

// The 2-norm of a row that `lanes` neighbouring threads hold, n elements each. The second half of the row is added to
// the first, then the second half of that, and so on: the order of PyTorch's reduction (Reduce.cuh) for rows of up to
// 64 elements.
template <int lanes, int n>
__device__ __forceinline__ float norm(const Values<n>& a) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  const unsigned row = (lanes == 32 ? ~0u : (1u << lanes % 32) - 1) << (lane / lanes * lanes);
  Values<n> sums = mul(a, a);
#pragma unroll
  for (int width = lanes / 2; width > 0; width /= 2) {
#pragma unroll
    for (int j = 0; j < n; ++j) sums.x[j] = __fadd_rn(sums.x[j], __shfl_xor_sync(row, sums.x[j], width));
  }
#pragma unroll
  for (int width = n / 2; width > 0; width /= 2) {
#pragma unroll
    for (int j = 0; j < width; ++j) sums.x[j] = __fadd_rn(sums.x[j], sums.x[j + width]);
  }
  return __fsqrt_rn(sums.x[0]);
}

// Accesses of up to 16 bytes, by the alignment.
template <typename T, int n>
struct alignas(sizeof(T) * n < 16 ? sizeof(T) * n : 16) Pack {
  T values[n];
};

// What a thread has seen of a sample: sums of differences from its first value, so that nothing cancels where the mean
// is far from 0.
struct Moments {
  float shift = 0;
  float count = 0;
  float sum = 0;
  float squares = 0;
};

// How a block reads an input that is on its way: its part of it lies in bytes [begin, end) of the piece.
struct Arrival {
  const PeerReader* reader = nullptr;
  const char* slot = nullptr;  // where the input lies
  std::int64_t begin = 0;
  std::int64_t end = 0;
  void* keep = nullptr;   // where a copy of the input goes
  bool is_last = false;   // the block reads nothing more of it
  bool is_active = true;  // the thread has something to compute; else it does as if, for the barriers' sake
};

// n neighbours along the fastest dimension, of every tensor of the program.
template <typename Code, int n>
class Tile {
 public:
  __device__ __forceinline__ Tile(const ProgramArgs<Code>& args, std::int64_t first, const Arrival& arrival)
      : args_(args), arrival_(arrival) {
#pragma unroll
    for (int d = 0; d + 1 < Code::kDims; ++d) {
      // 64-bit division takes some 100 instructions, 32-bit division 20.
      const bool small = ((first | args.sizes[d]) >> 32) == 0;
      const std::int64_t rest =
          small ? static_cast<std::uint32_t>(first) / static_cast<std::uint32_t>(args.sizes[d]) : first / args.sizes[d];
      coords_[d] = first - rest * args.sizes[d];
      first = rest;
    }
    coords_[Code::kDims - 1] = first;
  }

  // By all threads of the block: wait for the arriving input; false when the wait was given up.
  __device__ __forceinline__ bool arrived() const { return arrival_.reader->arrived(arrival_.begin, arrival_.end); }

  // By all threads of the block, after the last load of it: the sender is told ahead of the stores.
  __device__ __forceinline__ void has_read() const {
    if (arrival_.is_last) arrival_.reader->acknowledge();
  }

  template <int k, typename T>
  __device__ __forceinline__ Values<n> load() const {
    const Pack<T, n> pack = *reinterpret_cast<const Pack<T, n>*>(input<k, T>());
    if constexpr (k == Code::kArriving) {
      if (arrival_.keep != nullptr && arrival_.is_active)
        *reinterpret_cast<Pack<T, n>*>(static_cast<T*>(arrival_.keep) + offset(k)) = pack;
    }
    Values<n> result;
#pragma unroll
    for (int j = 0; j < n; ++j) result.x[j] = to_float(pack.values[j]);
    return result;
  }

  // Of an input whose stride along the fastest dimension is 0.
  template <int k, typename T>
  __device__ __forceinline__ float load_one() const {
    const T value = *input<k, T>();
    if constexpr (k == Code::kArriving) {
      if (arrival_.keep != nullptr && arrival_.is_active) static_cast<T*>(arrival_.keep)[offset(k)] = value;
    }
    return to_float(value);
  }

  template <int k, typename T, typename A>
  __device__ __forceinline__ void store(const A& a) const {
    if (Code::kArriving >= 0 && !arrival_.is_active) return;
    Pack<T, n> pack;
#pragma unroll
    for (int j = 0; j < n; ++j) pack.values[j] = from_float<T>(at(a, j));
    *reinterpret_cast<Pack<T, n>*>(static_cast<T*>(args_.outputs[k]) + offset(Code::kInputs + k)) = pack;
  }

  template <typename A>
  __device__ __forceinline__ void add(Moments& moments, const A& a) const {
    if (moments.count == 0) moments.shift = at(a, 0);
    moments.count += n;
#pragma unroll
    for (int j = 0; j < n; ++j) {
      const float difference = at(a, j) - moments.shift;
      moments.sum += difference;
      moments.squares += difference * difference;
    }
  }

  template <int k>
  __device__ __forceinline__ float scalar() const {
    return args_.scalars[k];
  }

 private:
  __device__ __forceinline__ std::int64_t offset(int operand) const {
    std::int64_t sum = 0;
#pragma unroll
    for (int d = 0; d < Code::kDims; ++d) sum += coords_[d] * args_.strides[operand][d];
    return sum;
  }

  template <int k, typename T>
  __device__ __forceinline__ const T* input() const {
    const void* base = k == Code::kArriving ? arrival_.slot : args_.inputs[k];
    return static_cast<const T*>(base) + offset(k);
  }

  const ProgramArgs<Code>& args_;
  const Arrival& arrival_;
  std::int64_t coords_[Code::kDims];
};

// Units are vectors, and behind them, where one dimension is left, single elements that fill none.
template <typename Code>
__device__ __forceinline__ void run_unit(const ProgramArgs<Code>& args, std::int64_t unit, const Arrival& arrival) {
  const std::int64_t vecs = args.numel / Code::kVec;
  if (unit < vecs) {
    Code::run(Tile<Code, Code::kVec>(args, unit * Code::kVec, arrival));
  } else if (unit < vecs + args.numel % Code::kVec) {
    if constexpr (Code::kVec > 1 && !Code::kHasNorm) {
      Code::run(Tile<Code, 1>(args, vecs * Code::kVec + (unit - vecs), arrival));
    }
  }
}

template <typename Code>
__device__ __forceinline__ void run_program(const ProgramArgs<Code>& args) {
  run_unit<Code>(args, blockIdx.x * static_cast<std::int64_t>(kProgramThreads) + threadIdx.x, Arrival{});
}

// A block takes tiles of a unit for each thread. The elements that fill no vector are a tile of their own, the last
// one.
template <typename Code>
__device__ __forceinline__ void run_program(const ProgramArgs<Code>& args, const ArrivingInput& input) {
  const PeerReader reader(input.wait);
  const std::int64_t vecs = args.numel / Code::kVec;
  const std::int64_t vec_tiles = (vecs + kProgramThreads - 1) / kProgramThreads;
  const std::int64_t rest = args.numel % Code::kVec;
  const std::int64_t tiles = vec_tiles + (rest != 0);
  // Else a block can need any part of the input.
  const bool in_order = Code::kDims == 1 && args.strides[Code::kArriving][0] == 1;
  bool has_read = false;  // all that this block is to read
  for (std::int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const bool is_rest = tile == vec_tiles;
    const std::int64_t first = tile * kProgramThreads;  // unit
    const std::int64_t count = is_rest ? rest : vecs - first < kProgramThreads ? vecs - first : kProgramThreads;
    const std::int64_t element = is_rest ? vecs * Code::kVec : first * Code::kVec;
    Arrival arrival{&reader, reader.slot() + input.offset, input.offset, input.offset + input.bytes, input.keep};
    if (in_order) {
      arrival.begin += element * Code::kArrivingBytes;
      arrival.end = arrival.begin + count * (is_rest ? 1 : Code::kVec) * Code::kArrivingBytes;
    }
    arrival.is_last = has_read = tile + gridDim.x >= tiles;
    arrival.is_active = threadIdx.x < count;
    const std::int64_t unit = arrival.is_active ? threadIdx.x : count - 1;
    bool arrived = false;
    if (!is_rest) {
      arrived = Code::run(Tile<Code, Code::kVec>(args, element + unit * Code::kVec, arrival));
    } else if constexpr (Code::kVec > 1 && !Code::kHasNorm) {
      arrived = Code::run(Tile<Code, 1>(args, element + unit, arrival));
    }
    if (!arrived) {
      has_read = false;
      break;
    }
  }
  if (!has_read) reader.acknowledge();
}

// Count, mean, and sum of squared differences from the mean: of what a block has seen.
struct Spread {
  double count = 0;
  double mean = 0;
  double squares = 0;
};

// The differences are from one value for all threads, so that they add up.
struct Sums {
  double count = 0;
  double sum = 0;
  double squares = 0;

  // n elements whose differences, and the squares of those, add up so; they are from a value at `distance` from ours.
  __device__ __forceinline__ void add(double n, double differences, double difference_squares, double distance) {
    count += n;
    sum += differences + n * distance;
    squares += difference_squares + distance * (2 * differences + n * distance);
  }
};

// Of a whole block, always in the same order; the result is the first thread's.
__device__ inline Sums sum_in_block(Sums mine) {
  __shared__ Sums warps[kProgramThreads / 32];
  for (int offset = 16; offset > 0; offset /= 2) {
    mine.count += __shfl_down_sync(~0u, mine.count, offset);
    mine.sum += __shfl_down_sync(~0u, mine.sum, offset);
    mine.squares += __shfl_down_sync(~0u, mine.squares, offset);
  }
  __syncthreads();  // the array may be in use still
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = mine;
  __syncthreads();
  for (int warp = 1; threadIdx.x == 0 && warp < kProgramThreads / 32; ++warp) {
    mine.count += warps[warp].count;
    mine.sum += warps[warp].sum;
    mine.squares += warps[warp].squares;
  }
  return mine;
}

// Each output is the standard deviation of a value over each sample. Every block leaves what it has found, and the
// last one of a sample adds it up, always in the same order. The tickets are left as they were found.
template <typename Code>
__device__ __forceinline__ void run_statistics(const ProgramArgs<Code>& args, const StatisticsArgs& statistics) {
  constexpr int kCount = Code::kOutputs;
  const std::int64_t begin = blockIdx.y * statistics.per_sample;
  const std::int64_t vecs = statistics.per_sample / Code::kVec;
  const std::int64_t rest = statistics.per_sample % Code::kVec;
  const std::int64_t threads = gridDim.x * static_cast<std::int64_t>(kProgramThreads);
  Moments moments[kCount];
#pragma unroll 4
  for (std::int64_t vec = blockIdx.x * static_cast<std::int64_t>(kProgramThreads) + threadIdx.x; vec < vecs;
       vec += threads) {
    Code::run(Tile<Code, Code::kVec>(args, begin + vec * Code::kVec, Arrival{}), moments);
  }
  if constexpr (Code::kVec > 1) {
    if (blockIdx.x == 0 && threadIdx.x < rest) {
      Code::run(Tile<Code, 1>(args, begin + vecs * Code::kVec + threadIdx.x, Arrival{}), moments);
    }
  }
  __shared__ float shifts[kCount];
  if (threadIdx.x == 0) {
    for (int k = 0; k < kCount; ++k) shifts[k] = moments[k].shift;
  }
  __syncthreads();
  Spread* partials = reinterpret_cast<Spread*>(statistics.partials) + blockIdx.y * gridDim.x * kCount;
  for (int k = 0; k < kCount; ++k) {
    Sums mine;
    const double distance = static_cast<double>(moments[k].shift) - shifts[k];
    if (moments[k].count != 0) mine.add(moments[k].count, moments[k].sum, moments[k].squares, distance);
    const Sums all = sum_in_block(mine);
    if (threadIdx.x == 0) {
      const double mean = all.sum / all.count;
      partials[blockIdx.x * kCount + k] = {all.count, shifts[k] + mean, all.squares - mean * all.sum};
    }
  }
  __shared__ bool is_last;
  if (threadIdx.x == 0) is_last = atom_add_acq_rel_gpu(statistics.tickets + blockIdx.y, 1) + 1 == gridDim.x;
  __syncthreads();
  if (!is_last) return;
  if (threadIdx.x == 0) st_relaxed_gpu(statistics.tickets + blockIdx.y, 0u);
  float results[kCount];
  for (int k = 0; k < kCount; ++k) {
    const double shift = partials[k].mean;
    Sums mine;
    for (unsigned block = threadIdx.x; block < gridDim.x; block += kProgramThreads) {
      const Spread part = partials[block * kCount + k];
      mine.add(part.count, 0, part.squares, part.mean - shift);
    }
    const Sums all = sum_in_block(mine);
    const double degrees = all.count - Code::kCorrection;
    const double squares = all.squares - all.sum * all.sum / all.count;
    results[k] = static_cast<float>(::sqrt((squares < 0 ? 0 : squares) / (degrees > 0 ? degrees : 0)));
  }
  if (threadIdx.x == 0) Code::store(Tile<Code, 1>(args, begin, Arrival{}), results);
}

}  // namespace cfg_parallel
