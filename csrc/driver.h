// The few calls of the CUDA driver that its runtime has no equal of. By dlsym: a link to libcuda would keep the module
// from loading where there is no driver.
#pragma once

#include <cuda.h>
#include <dlfcn.h>

#include <source_location>
#include <string>

#include "check.h"

namespace cfg_parallel {

struct Driver {
  CUresult (*get_current)(CUcontext*);
  CUresult (*set_current)(CUcontext);
  CUresult (*load_module)(CUmodule*, const void*);
  CUresult (*get_function)(CUfunction*, CUmodule, const char*);
  CUresult (*launch_kernel)(CUfunction, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, CUstream,
                            void**, void**);
  CUresult (*get_error_string)(CUresult, const char**);
};

inline const Driver& driver() {
  static const Driver calls = [] {
    void* library = dlopen("libcuda.so.1", RTLD_NOW);
    if (library == nullptr) throw Error("libcuda.so.1 was not found: no NVIDIA driver is installed");
    Driver driver{};
    const auto resolve = [&](auto& function, const char* name) {
      function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(dlsym(library, name));
      if (function == nullptr) throw Error(std::string("libcuda.so.1 has no symbol ") + name);
    };
    resolve(driver.get_current, "cuCtxGetCurrent");
    resolve(driver.set_current, "cuCtxSetCurrent");
    resolve(driver.load_module, "cuModuleLoadData");
    resolve(driver.get_function, "cuModuleGetFunction");
    resolve(driver.launch_kernel, "cuLaunchKernel");
    resolve(driver.get_error_string, "cuGetErrorString");
    return driver;
  }();
  return calls;
}

inline void check(CUresult status, const std::source_location& where = std::source_location::current()) {
  if (status == CUDA_SUCCESS) return;
  const char* text = nullptr;
  static_cast<void>(driver().get_error_string(status, &text));
  throw Error("CUDA: " + (text != nullptr ? std::string(text) : "error " + std::to_string(status)), where);
}

}  // namespace cfg_parallel
