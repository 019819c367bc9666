#include "nccl.h"

#include <dlfcn.h>

#include <algorithm>
#include <chrono>
#include <mutex>
#include <source_location>
#include <utility>

#include "check.h"
#include "device_guard.h"

// The part of nccl.h that point-to-point needs. NCCL keeps this ABI stable within major version 2.
extern "C" {
struct ncclComm;
using ncclComm_t = ncclComm*;
struct ncclUniqueId {
  char internal[128];
};
using ncclResult_t = int;
using ncclDataType_t = int;
}

namespace cfg_parallel {
namespace {

constexpr ncclResult_t kNcclSuccess = 0;
constexpr ncclResult_t kNcclInProgress = 7;
constexpr ncclDataType_t kNcclUint8 = 1;

struct NcclApi {
  ncclResult_t (*get_version)(int*);
  ncclResult_t (*get_unique_id)(ncclUniqueId*);
  ncclResult_t (*comm_init_rank)(ncclComm_t*, int, ncclUniqueId, int);
  ncclResult_t (*comm_destroy)(ncclComm_t);
  ncclResult_t (*comm_abort)(ncclComm_t);
  ncclResult_t (*comm_get_async_error)(ncclComm_t, ncclResult_t*);
  ncclResult_t (*send)(const void*, std::size_t, ncclDataType_t, int, ncclComm_t, cudaStream_t);
  ncclResult_t (*recv)(void*, std::size_t, ncclDataType_t, int, ncclComm_t, cudaStream_t);
  ncclResult_t (*group_start)();
  ncclResult_t (*group_end)();
  const char* (*get_error_string)(ncclResult_t);
  const char* (*get_last_error)(ncclComm_t);
};

template <typename Function>
void resolve(void* library, const char* name, Function*& function) {
  function = reinterpret_cast<Function*>(dlsym(library, name));
  if (function == nullptr) {
    throw Error(std::string("libnccl.so.2 has no symbol ") + name + "; NCCL 2.13 or newer is needed");
  }
}

NcclApi load_nccl() {
  constexpr const char* kLibrary = "libnccl.so.2";
  // The copy that PyTorch loaded, wherever it lies; a second copy of NCCL in one process would cost memory and
  // could be another version. Only a process without PyTorch's goes on to the loader's search path.
  void* library = dlopen(kLibrary, RTLD_NOW | RTLD_NOLOAD);
  if (library == nullptr) library = dlopen(kLibrary, RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    const char* reason = dlerror();
    throw Error(std::string("NCCL was not found: ") + (reason == nullptr ? kLibrary : reason) +
                ". Import a CUDA build of torch first, which loads it, or put the folder of libnccl.so.2 on "
                "LD_LIBRARY_PATH");
  }
  NcclApi api{};
  resolve(library, "ncclGetVersion", api.get_version);
  resolve(library, "ncclGetUniqueId", api.get_unique_id);
  resolve(library, "ncclCommInitRank", api.comm_init_rank);
  resolve(library, "ncclCommDestroy", api.comm_destroy);
  resolve(library, "ncclCommAbort", api.comm_abort);
  resolve(library, "ncclCommGetAsyncError", api.comm_get_async_error);
  resolve(library, "ncclSend", api.send);
  resolve(library, "ncclRecv", api.recv);
  resolve(library, "ncclGroupStart", api.group_start);
  resolve(library, "ncclGroupEnd", api.group_end);
  resolve(library, "ncclGetErrorString", api.get_error_string);
  resolve(library, "ncclGetLastError", api.get_last_error);
  return api;
}

const NcclApi& nccl() {
  // When loading throws, the static stays uninitialised and the next call tries again: torch may be imported by then.
  static const NcclApi api = load_nccl();
  return api;
}

std::string describe(ncclResult_t status, ncclComm_t comm) {
  std::string text = std::string("NCCL: ") + nccl().get_error_string(status);
  const char* detail = nccl().get_last_error(comm);
  if (detail != nullptr && *detail != '\0') text += std::string(": ") + detail;
  return text;
}

void check_nccl(ncclResult_t status, ncclComm_t comm = nullptr,
                const std::source_location& where = std::source_location::current()) {
  if (status != kNcclSuccess) throw Error(describe(status, comm), where);
}

}  // namespace

int nccl_version() {
  int version = 0;
  check_nccl(nccl().get_version(&version));
  return version;
}

NcclUniqueId nccl_unique_id() {
  ncclUniqueId id;
  check_nccl(nccl().get_unique_id(&id));
  return std::to_array(id.internal);
}

struct NcclComm::State {
  enum class Phase { kOpen, kAborted, kDestroyed };

  int rank;
  int world_size;
  int device;
  // Lock order: enqueue, then lifetime.
  std::timed_mutex enqueue;  // held by send and recv for as long as they are inside NCCL
  std::mutex lifetime;       // held while `comm` is read for a query, or freed
  ncclComm_t comm = nullptr;
  Phase phase = Phase::kOpen;

  // With `lifetime` held.
  ncclComm_t require_open(const std::source_location& where = std::source_location::current()) const {
    if (phase == Phase::kAborted) throw Error("this NCCL communicator was aborted", where);
    if (phase == Phase::kDestroyed) throw Error("this NCCL communicator was destroyed", where);
    return comm;
  }
};

NcclComm::NcclComm(const NcclUniqueId& id, int rank, int world_size, int device) : state_(std::make_unique<State>()) {
  if (world_size < 1 || rank < 0 || rank >= world_size) {
    throw Error("Expected 0 <= rank < world_size, but got rank " + std::to_string(rank) + " of " +
                std::to_string(world_size));
  }
  ncclUniqueId raw;
  std::copy(id.begin(), id.end(), raw.internal);
  state_->rank = rank;
  state_->world_size = world_size;
  state_->device = device;
  const NcclApi& api = nccl();
  const DeviceGuard guard(device);
  check_nccl(api.comm_init_rank(&state_->comm, world_size, raw, rank));
}

NcclComm::NcclComm(NcclComm&&) noexcept = default;
NcclComm& NcclComm::operator=(NcclComm&& other) noexcept {
  std::swap(state_, other.state_);  // `other` frees what this one held
  return *this;
}

NcclComm::~NcclComm() {
  if (state_ == nullptr || state_->comm == nullptr) return;
  // A destructor has nobody to report to, and at interpreter exit CUDA may be gone already: statuses are dropped.
  ncclResult_t async = kNcclSuccess;
  const ncclResult_t status = nccl().comm_get_async_error(state_->comm, &async);
  if (status == kNcclSuccess && async == kNcclSuccess) {
    static_cast<void>(nccl().comm_destroy(state_->comm));
  } else {
    static_cast<void>(nccl().comm_abort(state_->comm));
  }
}

void NcclComm::send(const std::vector<Buffer>& buffers, int peer, cudaStream_t stream) {
  exchange(Direction::kSend, buffers, peer, stream);
}

void NcclComm::recv(const std::vector<Buffer>& buffers, int peer, cudaStream_t stream) {
  exchange(Direction::kRecv, buffers, peer, stream);
}

void NcclComm::exchange(Direction direction, const std::vector<Buffer>& buffers, int peer, cudaStream_t stream) {
  State& state = *state_;
  const std::lock_guard enqueue(state.enqueue);
  ncclComm_t comm = nullptr;
  {
    const std::lock_guard lifetime(state.lifetime);
    comm = state.require_open();
  }
  if (peer < 0 || peer >= state.world_size) {
    throw Error("Expected a peer in [0, " + std::to_string(state.world_size) + "), but got " + std::to_string(peer));
  }
  const NcclApi& api = nccl();
  const DeviceGuard guard(state.device);
  check_nccl(api.group_start(), comm);
  ncclResult_t status = kNcclSuccess;
  for (const Buffer& buffer : buffers) {
    if (buffer.bytes == 0) continue;
    status = direction == Direction::kSend ? api.send(buffer.data, buffer.bytes, kNcclUint8, peer, comm, stream)
                                           : api.recv(buffer.data, buffer.bytes, kNcclUint8, peer, comm, stream);
    if (status != kNcclSuccess) break;
  }
  // The group is closed on failure too: it is a property of the thread, and the next exchange must not nest in it.
  const ncclResult_t end_status = api.group_end();
  if (status == kNcclSuccess) status = end_status;
  if (status == kNcclSuccess) return;
  // `comm` may have been freed by an abort that ended this very call, so it is not asked for details then.
  const std::lock_guard lifetime(state.lifetime);
  check_nccl(status, state.require_open());
}

void NcclComm::abort() {
  State& state = *state_;
  // An exchange returns within microseconds, unless it is connecting to a peer that does not answer: only then is
  // the communicator aborted under it, which is what makes NCCL return.
  std::unique_lock enqueue(state.enqueue, std::chrono::milliseconds(100));
  const std::lock_guard lifetime(state.lifetime);
  if (state.phase != State::Phase::kOpen) return;
  state.phase = State::Phase::kAborted;
  ncclComm_t comm = std::exchange(state.comm, nullptr);
  const DeviceGuard guard(state.device);
  check_nccl(nccl().comm_abort(comm));
}

void NcclComm::destroy() {
  State& state = *state_;
  const std::lock_guard enqueue(state.enqueue);
  const std::lock_guard lifetime(state.lifetime);
  if (state.phase != State::Phase::kOpen) return;
  state.phase = State::Phase::kDestroyed;
  ncclComm_t comm = std::exchange(state.comm, nullptr);
  const DeviceGuard guard(state.device);
  check_nccl(nccl().comm_destroy(comm));
}

std::optional<std::string> NcclComm::async_error() {
  State& state = *state_;
  const std::lock_guard lifetime(state.lifetime);
  ncclComm_t comm = state.require_open();
  ncclResult_t async = kNcclSuccess;
  check_nccl(nccl().comm_get_async_error(comm, &async), comm);
  if (async == kNcclSuccess || async == kNcclInProgress) return std::nullopt;
  return describe(async, comm);
}

int NcclComm::rank() const { return state_->rank; }
int NcclComm::world_size() const { return state_->world_size; }
int NcclComm::device() const { return state_->device; }

}  // namespace cfg_parallel
