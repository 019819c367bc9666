// The same names as csrc/memory_order.cuh, with the C++ memory orders that the PTX ones stand for.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <thread>

namespace cfg_parallel {

template <typename T>
T ld(const T* address, std::memory_order order) {
  return std::atomic_ref(*const_cast<T*>(address)).load(order);
}
inline std::uint64_t ld_acquire_sys(const std::uint64_t* address) {
  std::this_thread::yield();
  return ld(address, std::memory_order_acquire);
}
inline std::uint32_t ld_relaxed_sys(const std::uint32_t* address) { return ld(address, std::memory_order_relaxed); }
inline std::uint64_t ld_relaxed_gpu(const std::uint64_t* address) { return ld(address, std::memory_order_relaxed); }
inline void st_release_sys(std::uint64_t* address, std::uint64_t value) {
  std::atomic_ref(*address).store(value, std::memory_order_release);
}
inline void st_relaxed_sys(std::uint32_t* address, std::uint32_t value) {
  std::atomic_ref(*address).store(value, std::memory_order_relaxed);
}
inline void st_relaxed_gpu(std::uint64_t* address, std::uint64_t value) {
  std::atomic_ref(*address).store(value, std::memory_order_relaxed);
}
inline void st_relaxed_gpu(std::uint32_t* address, std::uint32_t value) {
  std::atomic_ref(*address).store(value, std::memory_order_relaxed);
}
inline std::uint32_t atom_add_acq_rel_gpu(std::uint32_t* address, std::uint32_t value) {
  return std::atomic_ref(*address).fetch_add(value, std::memory_order_acq_rel);
}
inline bool atom_cas_relaxed_gpu(std::uint64_t* address, std::uint64_t expected, std::uint64_t value) {
  return std::atomic_ref(*address).compare_exchange_strong(expected, value, std::memory_order_relaxed);
}
inline std::uint64_t global_timer_ns() {
  return static_cast<std::uint64_t>(std::chrono::steady_clock::now().time_since_epoch().count());
}

}  // namespace cfg_parallel
