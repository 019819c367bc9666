// Makes `device` current for a scope. PyTorch shares the primary context and the current device with us, so a call
// into this module must leave the caller's device as it found it.
#pragma once

#include "check.h"

namespace cfg_parallel {

class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check(cudaGetDevice(&previous_));
    if (device == previous_) return;
    check(cudaSetDevice(device));
    changed_ = true;
  }
  ~DeviceGuard() {
    // It was current a moment ago; a destructor has nobody to tell if it no longer can be.
    if (changed_) static_cast<void>(cudaSetDevice(previous_));
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = 0;
  bool changed_ = false;
};

}  // namespace cfg_parallel
