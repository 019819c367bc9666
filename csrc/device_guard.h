// Makes `device` current for a scope, and leaves the calling thread as it was found: PyTorch has its own CUDA runtime,
// but the current context of a thread is shared.
#pragma once

#include <cuda.h>
#include <dlfcn.h>

#include "check.h"

namespace cfg_parallel {

// The context is saved and restored, not the device: cudaSetDevice(previous) would create a context of some 500 MiB on
// a GPU that the process has never used, such as the leader's in a follower.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    const Driver& calls = driver();
    // It fails only before cuInit, when nothing is current yet.
    if (calls.get_current(&previous_) != CUDA_SUCCESS) previous_ = nullptr;
    check(cudaSetDevice(device));
  }
  ~DeviceGuard() {
    // It was current a moment ago; a destructor has nobody to tell if it no longer can be.
    static_cast<void>(driver().set_current(previous_));
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  struct Driver {
    CUresult (*get_current)(CUcontext*);
    CUresult (*set_current)(CUcontext);
  };

  static const Driver& driver() {
    // By dlsym: a link to libcuda would keep the module from loading where there is no driver.
    static const Driver calls = [] {
      void* library = dlopen("libcuda.so.1", RTLD_NOW);
      if (library == nullptr) throw Error("libcuda.so.1 was not found: no NVIDIA driver is installed");
      return Driver{reinterpret_cast<decltype(Driver::get_current)>(dlsym(library, "cuCtxGetCurrent")),
                    reinterpret_cast<decltype(Driver::set_current)>(dlsym(library, "cuCtxSetCurrent"))};
    }();
    return calls;
  }

  CUcontext previous_ = nullptr;
};

}  // namespace cfg_parallel
