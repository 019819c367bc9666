// Makes `device` current for a scope, and leaves the calling thread as it was found: PyTorch has its own CUDA runtime,
// but the current context of a thread is shared.
#pragma once

#include "driver.h"

namespace cfg_parallel {

// The context is saved and restored, not the device: cudaSetDevice(previous) would create a context of some 500 MiB on
// a GPU that the process has never used, such as the leader's in a follower.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    // It fails only before cuInit, when nothing is current yet.
    if (driver().get_current(&previous_) != CUDA_SUCCESS) previous_ = nullptr;
    check(cudaSetDevice(device));
  }
  ~DeviceGuard() {
    // It was current a moment ago; a destructor has nobody to tell if it no longer can be.
    static_cast<void>(driver().set_current(previous_));
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  CUcontext previous_ = nullptr;
};

}  // namespace cfg_parallel
