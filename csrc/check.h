// One exception type for every failed CUDA or NCCL call; it carries the call site's file:line.
#pragma once

#include <cuda_runtime.h>

#include <source_location>
#include <stdexcept>
#include <string>
#include <string_view>

namespace cfg_parallel {

class Error : public std::runtime_error {
 public:
  explicit Error(const std::string& message, const std::source_location& where = std::source_location::current())
      : std::runtime_error(message + " [" + location(where) + "]") {}

 private:
  static std::string location(const std::source_location& where) {
    const std::string_view path = where.file_name();
    const std::string_view name = path.substr(path.find_last_of('/') + 1);  // npos + 1 == 0
    return std::string(name) + ":" + std::to_string(where.line());
  }
};

inline void check(cudaError_t status, const std::source_location& where = std::source_location::current()) {
  if (status == cudaSuccess) return;
  // Clear it, or the next launch's cudaGetLastError would report this failure a second time.
  static_cast<void>(cudaGetLastError());
  throw Error(std::string("CUDA: ") + cudaGetErrorString(status) + " (" + cudaGetErrorName(status) + ")", where);
}

}  // namespace cfg_parallel
