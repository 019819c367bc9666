#include <algorithm>
#include <numeric>
#include <type_traits>
#include <utility>

#include "check.h"
#include "peer_wait.cuh"
#include "program.h"
#include "specializations.h"
#include "vec.cuh"

namespace cfg_parallel {
namespace {

constexpr int kThreads = 256;
constexpr int kBlocksPerSm = 8;
// Elements that a thread takes at once: 16 bytes of bf16 where the code is unrolled. The general kernel keeps its
// registers in local memory, which fewer elements let stay in L1.
constexpr int kStaticVec = 8;
constexpr int kGeneralVec = 4;

struct KernelArgs {
  const void* inputs[kMaxInputs];
  void* outputs[kMaxOutputs];
  std::int64_t numel;
  std::int64_t sizes[kMaxDims];  // the fastest dimension first
  std::int64_t input_strides[kMaxInputs][kMaxDims];
  std::int64_t output_strides[kMaxOutputs][kMaxDims];
  float scalars[kMaxScalars];
  Instruction code[kMaxInstructions];
  DType input_dtypes[kMaxInputs];
  DType output_dtypes[kMaxOutputs];
  std::uint8_t stores[kMaxOutputs];
  int num_dims;
  int num_inputs;
  int num_outputs;
  int num_instructions;
  int lanes;  // that hold a row, for norms
};

struct NoPeer {};
struct PeerArgs {
  PeerWait wait;
  std::int64_t offset;  // bytes, of the input in the piece
  std::int64_t bytes;   // of the input
  void* keep;           // a copy of it; null for none
  int input;
};

// The peer's input as one block sees it.
struct Arrived {
  const void* base = nullptr;
  void* keep = nullptr;
  int input = -1;
};

template <int kVec>
using Values = float[kVec];

template <typename T, int kVec>
__device__ __forceinline__ void load_as(Values<kVec>& values, const void* base, std::int64_t offset,
                                        std::int64_t stride) {
  const T* address = static_cast<const T*>(base) + offset;
  if (kVec == 1 || stride == 0) {
    const float value = to_float(*address);
#pragma unroll
    for (int j = 0; j < kVec; ++j) values[j] = value;
  } else {
    const Vec<T, kVec> vec = load_vec<kVec>(address, 0);
#pragma unroll
    for (int j = 0; j < kVec; ++j) values[j] = to_float(vec.values[j]);
  }
}

template <int kVec>
__device__ __forceinline__ void load(Values<kVec>& values, DType dtype, const void* base, std::int64_t offset,
                                     std::int64_t stride) {
  switch (dtype) {
    case DType::kFloat32:
      return load_as<float, kVec>(values, base, offset, stride);
    case DType::kFloat16:
      return load_as<__half, kVec>(values, base, offset, stride);
    case DType::kBFloat16:
      return load_as<__nv_bfloat16, kVec>(values, base, offset, stride);
  }
}

template <typename T, int kVec>
__device__ __forceinline__ void store_as(const Values<kVec>& values, void* base, std::int64_t offset) {
  Vec<T, kVec> vec;
#pragma unroll
  for (int j = 0; j < kVec; ++j) vec.values[j] = from_float<T>(values[j]);
  store_vec<kVec>(static_cast<T*>(base) + offset, 0, vec);
}

template <int kVec>
__device__ __forceinline__ void store(const Values<kVec>& values, DType dtype, void* base, std::int64_t offset) {
  switch (dtype) {
    case DType::kFloat32:
      return store_as<float, kVec>(values, base, offset);
    case DType::kFloat16:
      return store_as<__half, kVec>(values, base, offset);
    case DType::kBFloat16:
      return store_as<__nv_bfloat16, kVec>(values, base, offset);
  }
}

__device__ __forceinline__ float round_as(DType dtype, float value) {
  switch (dtype) {
    case DType::kFloat32:
      return value;
    case DType::kFloat16:
      return round_to<__half>(value);
    case DType::kBFloat16:
      return round_to<__nv_bfloat16>(value);
  }
  return value;
}

// The 2-norm of a row that `lanes` neighbouring lanes hold, kVec elements each. A row of 64 is summed as PyTorch's
// reduction does it (Reduce.cuh, 32 threads for a row): elements l and l + 32 first, then neighbours pairwise.
template <int kVec>
__device__ __forceinline__ float row_norm(const Values<kVec>& x, int lanes) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  const unsigned row = (lanes == 32 ? ~0u : (1u << lanes) - 1) << (lane / lanes * lanes);
  Values<kVec> sums;
#pragma unroll
  for (int j = 0; j < kVec; ++j) sums[j] = __fmul_rn(x[j], x[j]);
  int first = 1;
  if (lanes == 8) {
#pragma unroll
    for (int j = 0; j < kVec; ++j) sums[j] = __fadd_rn(sums[j], __shfl_xor_sync(row, sums[j], 4));
    lanes = 4;  // both halves of the row hold the same sums now
  }
#pragma unroll
  for (int width = 1; width < kVec; width *= 2) {
#pragma unroll
    for (int j = 0; j + width < kVec; j += 2 * width) sums[j] = __fadd_rn(sums[j], sums[j + width]);
  }
  float sum = sums[0];
  for (; first < lanes; first *= 2) sum = __fadd_rn(sum, __shfl_xor_sync(row, sum, first));
  return __fsqrt_rn(sum);
}

// The _rn intrinsics are there because the compiler never contracts them: two roundings stay two.
template <int kVec>
__device__ __forceinline__ void execute(const Instruction instruction, Values<kVec> (&registers)[kRegisters],
                                        const KernelArgs& args) {
  Values<kVec> a, b, c, result;
  const auto read = [&](Values<kVec>& values, std::uint8_t operand) {
#pragma unroll
    for (int j = 0; j < kVec; ++j) {
      values[j] = operand >= kScalar ? args.scalars[operand - kScalar] : registers[operand][j];
    }
  };
  const auto each = [&](auto compute) {
#pragma unroll
    for (int j = 0; j < kVec; ++j) result[j] = compute(j);
  };
  read(a, instruction.a);
  read(b, instruction.b);
  switch (instruction.op) {
    case Op::kAdd:
      each([&](int j) { return __fadd_rn(a[j], b[j]); });
      break;
    case Op::kSub:
      each([&](int j) { return __fsub_rn(a[j], b[j]); });
      break;
    case Op::kMul:
      each([&](int j) { return __fmul_rn(a[j], b[j]); });
      break;
    case Op::kDiv:
      each([&](int j) { return __fdiv_rn(a[j], b[j]); });
      break;
    case Op::kFma:
      read(c, instruction.c);
      each([&](int j) { return __fmaf_rn(a[j], b[j], c[j]); });
      break;
    case Op::kNeg:
      each([&](int j) { return -a[j]; });
      break;
    case Op::kAbs:
      each([&](int j) { return fabsf(a[j]); });
      break;
    case Op::kSqrt:
      each([&](int j) { return __fsqrt_rn(a[j]); });
      break;
    case Op::kClamp:
      read(c, instruction.c);
      each([&](int j) { return isnan(a[j]) ? a[j] : fminf(fmaxf(a[j], b[j]), c[j]); });
      break;
    case Op::kRound:
      each([&](int j) { return a[j]; });
      break;
    case Op::kNorm:
      if constexpr (kVec == kStaticVec) {
        const float norm = row_norm<kVec>(a, args.lanes);
        each([&](int) { return norm; });
      }
      break;
  }
#pragma unroll
  for (int j = 0; j < kVec; ++j) registers[instruction.dst][j] = round_as(instruction.round, result[j]);
}

// Any program: its code is data.
struct General {
  static constexpr int kMostDims = kMaxDims;
  static constexpr bool kWaits = true;
  __device__ static int num_inputs(const KernelArgs& args) { return args.num_inputs; }
  __device__ static int num_outputs(const KernelArgs& args) { return args.num_outputs; }
  __device__ static DType input_dtype(const KernelArgs& args, int k) { return args.input_dtypes[k]; }
  __device__ static DType output_dtype(const KernelArgs& args, int k) { return args.output_dtypes[k]; }
  __device__ static int stored(const KernelArgs& args, int k) { return args.stores[k]; }
  template <int kVec>
  __device__ static void run(Values<kVec> (&registers)[kRegisters], const KernelArgs& args) {
    for (int i = 0; i < args.num_instructions; ++i) execute<kVec>(args.code[i], registers, args);
  }
};

// One program: its code is known to the compiler. For tensors that all lie as one dimension.
template <std::size_t kProgram>
struct Static {
  static constexpr int kMostDims = 1;
  static constexpr StaticProgram kCode = kStaticPrograms[kProgram];
  static constexpr bool kWaits = kCode.waits();
  __device__ static constexpr int num_inputs(const KernelArgs&) { return kCode.num_inputs; }
  __device__ static constexpr int num_outputs(const KernelArgs&) { return 1; }
  __device__ static constexpr DType input_dtype(const KernelArgs&, int k) {
    constexpr DType k0 = kCode.inputs[0], k1 = kCode.inputs[1], k2 = kCode.inputs[2], k3 = kCode.inputs[3];
    return k == 0 ? k0 : k == 1 ? k1 : k == 2 ? k2 : k3;
  }
  __device__ static constexpr DType output_dtype(const KernelArgs&, int) { return kCode.output; }
  __device__ static constexpr int stored(const KernelArgs&, int) { return kCode.store; }
  template <int kVec, int kIndex = 0>
  __device__ __forceinline__ static void run(Values<kVec> (&registers)[kRegisters], const KernelArgs& args) {
    if constexpr (kIndex < kCode.num_instructions) {
      constexpr Instruction instruction = kCode.code[kIndex];
      execute<kVec>(instruction, registers, args);
      run<kVec, kIndex + 1>(registers, args);
    }
  }
};

// kVec neighbours along the fastest dimension, from element `first` on.
template <typename Code, int kVec>
__device__ __forceinline__ void compute(const KernelArgs& args, std::int64_t first, const Arrived& arrived) {
  std::int64_t coords[Code::kMostDims];
  std::int64_t rest = first;
#pragma unroll
  for (int d = 0; d + 1 < Code::kMostDims; ++d) {
    coords[d] = rest;
    if (d + 1 < args.num_dims) {
      // 64-bit division takes some 100 instructions, 32-bit division 20.
      const bool small = ((rest | args.sizes[d]) >> 32) == 0;
      const std::int64_t next =
          small ? static_cast<std::uint32_t>(rest) / static_cast<std::uint32_t>(args.sizes[d]) : rest / args.sizes[d];
      coords[d] = rest - next * args.sizes[d];
      rest = next;
    } else {
      rest = 0;
    }
  }
  coords[Code::kMostDims - 1] = rest;
  const auto offset_of = [&](const std::int64_t (&strides)[kMaxDims]) {
    std::int64_t offset = 0;
#pragma unroll
    for (int d = 0; d < Code::kMostDims; ++d) offset += coords[d] * strides[d];
    return offset;
  };
  Values<kVec> registers[kRegisters];
#pragma unroll
  for (int k = 0; k < kMaxInputs; ++k) {
    if (k < Code::num_inputs(args)) {
      const DType dtype = Code::input_dtype(args, k);
      const std::int64_t offset = offset_of(args.input_strides[k]);
      const bool has_arrived = k == arrived.input;
      load<kVec>(registers[k], dtype, has_arrived ? arrived.base : args.inputs[k], offset, args.input_strides[k][0]);
      if (has_arrived && arrived.keep != nullptr) {
        if (kVec > 1 && args.input_strides[k][0] == 0) {
          store<1>(reinterpret_cast<const Values<1>&>(registers[k]), dtype, arrived.keep, offset);
        } else {
          store<kVec>(registers[k], dtype, arrived.keep, offset);
        }
      }
    }
  }
  Code::template run<kVec>(registers, args);
#pragma unroll
  for (int k = 0; k < kMaxOutputs; ++k) {
    if (k < Code::num_outputs(args)) {
      store<kVec>(registers[Code::stored(args, k)], Code::output_dtype(args, k), args.outputs[k],
                  offset_of(args.output_strides[k]));
    }
  }
}

__host__ __device__ constexpr std::int64_t size_of(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

// Thread by thread kVec elements, then, where one dimension is left, what does not fill a vector one by one.
template <typename Code, int kVec, typename Peer>
__global__ void __launch_bounds__(kThreads)
    program_kernel(const __grid_constant__ KernelArgs args, const __grid_constant__ Peer peer) {
  constexpr bool kWaits = std::is_same_v<Peer, PeerArgs>;
  const std::int64_t vecs = args.numel / kVec;
  const std::int64_t units = vecs + args.numel % kVec;
  const auto run = [&](std::int64_t unit, const Arrived& arrived) {
    if (unit < vecs) {
      compute<Code, kVec>(args, unit * kVec, arrived);
    } else if (unit < units) {
      compute<Code, 1>(args, vecs * kVec + (unit - vecs), arrived);
    }
  };
  if constexpr (kWaits) {
    PeerReader reader(peer.wait);
    const Arrived arrived{reader.slot() + peer.offset, peer.keep, peer.input};
    const std::int64_t size = size_of(args.input_dtypes[peer.input]);
    // Else a tile can read any part of the input.
    const bool in_order = args.num_dims == 1 && args.input_strides[peer.input][0] == 1;
    const auto element_of = [&](std::int64_t unit) { return unit < vecs ? unit * kVec : vecs * kVec + (unit - vecs); };
    for (std::int64_t tile = blockIdx.x; tile * kThreads < units; tile += gridDim.x) {
      const std::int64_t first = tile * kThreads;
      const std::int64_t last = first + kThreads < units ? first + kThreads : units;
      const std::int64_t begin = in_order ? element_of(first) * size : 0;
      const std::int64_t end = in_order ? element_of(last) * size : peer.bytes;
      if (reader.arrived(peer.offset + begin, peer.offset + end)) {
        run(first + threadIdx.x, arrived);
      }
    }
    reader.acknowledge();
  } else {
    const std::int64_t threads = static_cast<std::int64_t>(gridDim.x) * kThreads;
    for (std::int64_t unit = blockIdx.x * static_cast<std::int64_t>(kThreads) + threadIdx.x; unit < units;
         unit += threads) {
      run(unit, Arrived{});
    }
  }
}

template <typename Code, int kVec>
void launch_kernel(const KernelArgs& args, const PeerArgs* peer, cudaStream_t stream) {
  int device = 0;
  int num_sms = 0;
  check(cudaGetDevice(&device));
  check(cudaDeviceGetAttribute(&num_sms, cudaDevAttrMultiProcessorCount, device));
  const std::int64_t units = args.numel / kVec + args.numel % kVec;
  const std::int64_t per_sm = peer != nullptr ? kPeerBlocksPerSm : kBlocksPerSm;
  const auto blocks =
      static_cast<unsigned>(std::clamp<std::int64_t>((units + kThreads - 1) / kThreads, 1, per_sm * num_sms));
  if (peer == nullptr) {
    program_kernel<Code, kVec><<<blocks, kThreads, 0, stream>>>(args, NoPeer{});
  } else if constexpr (Code::kWaits) {
    program_kernel<Code, kVec><<<blocks, kThreads, 0, stream>>>(args, *peer);
  } else {
    throw Error("Expected a kernel that waits for a peer");
  }
  check(cudaGetLastError());
}

using Launcher = void (*)(const KernelArgs&, const PeerArgs*, cudaStream_t);

constexpr auto kStaticLaunchers = []<std::size_t... kIndex>(std::index_sequence<kIndex...>) {
  return std::array<Launcher, sizeof...(kIndex)>{&launch_kernel<Static<kIndex>, kStaticVec>...};
}(std::make_index_sequence<kStaticPrograms.size()>());

bool is_aligned(const void* pointer, std::int64_t alignment) {
  return reinterpret_cast<std::uintptr_t>(pointer) % static_cast<std::uintptr_t>(alignment) == 0;
}

Specialization describe(const StaticProgram& program) {
  constexpr const char* kTypes[] = {"float32", "float16", "bfloat16"};
  return {.name = std::string(program.name()) + " " + kTypes[static_cast<int>(program.output)],
          .inputs = {program.inputs, program.inputs + program.num_inputs},
          .outputs = {program.output},
          .code = {program.code, program.code + program.num_instructions},
          .stores = {program.store}};
}

void require(bool condition, const std::string& what) {
  if (!condition) throw Error("Expected a program with " + what);
}

}  // namespace

std::vector<Specialization> specializations() {
  std::vector<Specialization> all;
  for (const StaticProgram& program : kStaticPrograms) all.push_back(describe(program));
  return all;
}

Program::Program(std::vector<std::int64_t> shape, std::vector<Operand> inputs, std::vector<Operand> outputs,
                 std::vector<Instruction> code, std::vector<std::uint8_t> stores)
    : shape_(shape.rbegin(), shape.rend()),
      inputs_(std::move(inputs)),
      outputs_(std::move(outputs)),
      code_(std::move(code)),
      stores_(std::move(stores)) {
  require(inputs_.size() <= kMaxInputs && !outputs_.empty() && outputs_.size() <= kMaxOutputs,
          "at most " + std::to_string(kMaxInputs) + " inputs and 1 to " + std::to_string(kMaxOutputs) + " outputs");
  require(code_.size() <= kMaxInstructions, "at most " + std::to_string(kMaxInstructions) + " instructions");
  require(stores_.size() == outputs_.size(), "a register for each output");
  require(std::ranges::all_of(shape_, [](std::int64_t size) { return size >= 0; }), "sizes of at least 0");
  bool has_norm = false;
  const auto in_range = [](std::uint8_t operand) {
    return operand >= kScalar ? operand - kScalar < kMaxScalars : operand < kRegisters;
  };
  for (const Instruction& i : code_) {
    require(i.dst < kRegisters && in_range(i.a) && in_range(i.b) && in_range(i.c), "operands in range");
    has_norm |= i.op == Op::kNorm;
  }
  require(std::ranges::all_of(stores_, [](std::uint8_t r) { return r < kRegisters; }), "outputs from registers");
  for (std::vector<Operand>* operands : {&inputs_, &outputs_}) {
    for (Operand& operand : *operands) {
      require(operand.strides.size() == shape_.size(), "a stride for each dimension");
      std::ranges::reverse(operand.strides);
    }
  }
  if (has_norm) {
    const std::int64_t row = shape_.empty() ? 0 : shape_[0];
    const std::int64_t lanes = row / kStaticVec;
    require(row % kStaticVec == 0 && lanes >= 1 && lanes <= 32 && (lanes & (lanes - 1)) == 0,
            "rows of 8, 16, 32, 64, 128 or 256 elements for norms");
    lanes_ = static_cast<int>(lanes);
  }
  merge_dimensions();
  require(shape_.size() <= kMaxDims, "at most " + std::to_string(kMaxDims) + " dimensions that do not lie as one");
  for (std::size_t i = 0; i < kStaticPrograms.size(); ++i) {
    const Specialization known = describe(kStaticPrograms[i]);
    const auto same_types = [](const std::vector<Operand>& operands, const std::vector<DType>& dtypes) {
      return std::ranges::equal(operands, dtypes, {}, &Operand::dtype);
    };
    if (known.code == code_ && known.stores == stores_ && same_types(inputs_, known.inputs) &&
        same_types(outputs_, known.outputs)) {
      specialization_ = static_cast<int>(i);
    }
  }
}

// Those of one element left out, the others in the order of the first output's strides, and neighbours merged where
// every operand lies as one dimension would.
void Program::merge_dimensions() {
  std::vector<std::size_t> order;
  for (std::size_t d = 0; d < shape_.size(); ++d) {
    if (shape_[d] != 1) order.push_back(d);
  }
  if (lanes_ == 0) {  // the threads of a norm's row are neighbours
    std::ranges::stable_sort(order, {}, [&](std::size_t d) { return outputs_[0].strides[d]; });
  }
  const auto operands = [&](auto visit) {
    for (Operand& operand : inputs_) visit(operand);
    for (Operand& operand : outputs_) visit(operand);
  };
  operands([&](Operand& operand) {
    std::vector<std::int64_t> strides;
    for (const std::size_t d : order) strides.push_back(operand.strides[d]);
    operand.strides = std::move(strides);
  });
  std::vector<std::int64_t> shape;
  for (const std::size_t d : order) shape.push_back(shape_[d]);
  for (std::size_t d = 0; d + 1 < shape.size();) {
    bool merges = true;
    operands([&](const Operand& operand) { merges &= operand.strides[d + 1] == operand.strides[d] * shape[d]; });
    if (!merges) {
      ++d;
      continue;
    }
    shape[d] *= shape[d + 1];
    shape.erase(shape.begin() + static_cast<std::ptrdiff_t>(d) + 1);
    operands(
        [&](Operand& operand) { operand.strides.erase(operand.strides.begin() + static_cast<std::ptrdiff_t>(d) + 1); });
  }
  shape_ = std::move(shape);
}

bool Program::vectorizes(int vec, const std::vector<const void*>& inputs, const std::vector<void*>& outputs,
                         const PeerInput* peer) const {
  if (shape_.empty()) return false;
  // With one dimension what is left over goes one by one; with more every row would have a rest.
  if (shape_.size() > 1 && shape_[0] % vec != 0) return false;
  const auto fits = [&](const Operand& operand, const void* pointer) {
    const std::int64_t size = size_of(operand.dtype);
    return operand.strides[0] == 1 && is_aligned(pointer, std::min<std::int64_t>(16, vec * size)) &&
           std::ranges::all_of(operand.strides.begin() + 1, operand.strides.end(),
                               [&](std::int64_t stride) { return stride % vec == 0; });
  };
  for (std::size_t k = 0; k < inputs_.size(); ++k) {
    const bool in_slot = peer != nullptr && static_cast<std::size_t>(peer->input) == k;  // of which offsets are aligned
    if (inputs_[k].strides[0] != 0 && !fits(inputs_[k], in_slot ? peer->keep : inputs[k])) return false;
  }
  for (std::size_t k = 0; k < outputs_.size(); ++k) {
    if (!fits(outputs_[k], outputs[k])) return false;
  }
  return true;
}

void Program::launch(const std::vector<const void*>& inputs, const std::vector<void*>& outputs,
                     const std::vector<float>& scalars, const PeerInput* peer, cudaStream_t stream) const {
  if (inputs.size() != inputs_.size() || outputs.size() != outputs_.size() || scalars.size() > kMaxScalars) {
    throw Error("Expected " + std::to_string(inputs_.size()) + " inputs and " + std::to_string(outputs_.size()) +
                " outputs, but got " + std::to_string(inputs.size()) + " and " + std::to_string(outputs.size()));
  }
  KernelArgs args{};
  args.numel = std::accumulate(shape_.begin(), shape_.end(), std::int64_t{1}, std::multiplies<>());
  if (args.numel == 0 && peer == nullptr) return;  // a peer's piece must be acknowledged whatever it holds
  std::ranges::copy(shape_, args.sizes);
  args.num_dims = static_cast<int>(shape_.size());
  args.num_inputs = static_cast<int>(inputs.size());
  args.num_outputs = static_cast<int>(outputs.size());
  args.num_instructions = static_cast<int>(code_.size());
  args.lanes = lanes_;
  for (std::size_t k = 0; k < inputs.size(); ++k) {
    args.inputs[k] = inputs[k];
    args.input_dtypes[k] = inputs_[k].dtype;
    std::ranges::copy(inputs_[k].strides, args.input_strides[k]);
  }
  for (std::size_t k = 0; k < outputs.size(); ++k) {
    args.outputs[k] = outputs[k];
    args.output_dtypes[k] = outputs_[k].dtype;
    args.stores[k] = stores_[k];
    std::ranges::copy(outputs_[k].strides, args.output_strides[k]);
  }
  std::ranges::copy(scalars, args.scalars);
  std::ranges::copy(code_, args.code);
  PeerArgs waiting{};
  const PeerArgs* wait = nullptr;
  if (peer != nullptr) {
    const Operand& input = inputs_.at(static_cast<std::size_t>(peer->input));
    std::int64_t bytes = size_of(input.dtype);
    for (std::size_t d = 0; d < shape_.size(); ++d) bytes *= input.strides[d] == 0 ? 1 : shape_[d];
    waiting = {.wait = peer->wait, .offset = peer->offset, .bytes = bytes, .keep = peer->keep, .input = peer->input};
    wait = &waiting;
  }
  if (vectorizes(kStaticVec, inputs, outputs, peer)) {
    const bool has_kernel = specialization_ >= 0 && shape_.size() == 1 &&
                            (peer == nullptr || kStaticPrograms[static_cast<std::size_t>(specialization_)].waits());
    if (has_kernel) return kStaticLaunchers[static_cast<std::size_t>(specialization_)](args, wait, stream);
    if (lanes_ > 0) return launch_kernel<General, kStaticVec>(args, wait, stream);
  }
  if (lanes_ > 0) throw Error("Expected tensors whose last dimension is contiguous and aligned to 16 bytes for norms");
  if (vectorizes(kGeneralVec, inputs, outputs, peer)) return launch_kernel<General, kGeneralVec>(args, wait, stream);
  launch_kernel<General, 1>(args, wait, stream);
}

std::string Program::specialization() const {
  return specialization_ < 0 ? "" : describe(kStaticPrograms[static_cast<std::size_t>(specialization_)]).name;
}

}  // namespace cfg_parallel
