// The Python face of the native module: the only file that knows pybind11. Pointers and streams arrive as integers.
#include <cuda_runtime.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "check.h"
#include "combine.h"
#include "device_guard.h"
#include "nccl.h"

namespace py = pybind11;

namespace cfg_parallel {
namespace {

// Freeing a communicator can wait for the network; other Python threads, the one that would abort it among them,
// must be able to run meanwhile.
struct DeleteWithoutGil {
  void operator()(NcclComm* comm) const {
    const py::gil_scoped_release release;
    delete comm;
  }
};

using PyBuffers = std::vector<std::pair<std::uintptr_t, std::size_t>>;

std::vector<Buffer> to_buffers(const PyBuffers& pairs) {
  std::vector<Buffer> buffers;
  buffers.reserve(pairs.size());
  for (const auto& [pointer, bytes] : pairs) {
    buffers.push_back({reinterpret_cast<void*>(pointer), bytes});
  }
  return buffers;
}

NcclUniqueId to_unique_id(const py::bytes& bytes) {
  const std::string text = bytes;
  NcclUniqueId id{};
  if (text.size() != id.size()) {
    throw Error("Expected an NCCL unique id of " + std::to_string(id.size()) + " bytes, but got " +
                std::to_string(text.size()));
  }
  std::copy(text.begin(), text.end(), id.begin());
  return id;
}

py::dict build_info() {
  py::dict info;
  info["version"] = CFG_PARALLEL_VERSION;
  info["cuda"] = CFG_PARALLEL_CUDA_VERSION;
  info["archs"] = CFG_PARALLEL_CUDA_ARCHS;
  info["compiler"] = CFG_PARALLEL_COMPILER;
  info["pybind11"] = PYBIND11_TOSTRING(PYBIND11_VERSION_MAJOR) "." PYBIND11_TOSTRING(PYBIND11_VERSION_MINOR);
  return info;
}

int cuda_device_count() {
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  // No driver, or a driver without a device: a machine without a GPU, which is an answer and not a failure.
  if (status == cudaErrorNoDevice || status == cudaErrorInsufficientDriver) {
    static_cast<void>(cudaGetLastError());
    return 0;
  }
  check(status);
  return count;
}

void combine(std::uintptr_t cond, std::uintptr_t uncond, std::uintptr_t out, std::int64_t numel, float scale,
             DType dtype, Numerics numerics, int device, std::uintptr_t stream) {
  const DeviceGuard guard(device);
  launch_combine({.cond = reinterpret_cast<const void*>(cond),
                  .uncond = reinterpret_cast<const void*>(uncond),
                  .out = reinterpret_cast<void*>(out),
                  .numel = numel,
                  .scale = scale,
                  .dtype = dtype,
                  .numerics = numerics},
                 reinterpret_cast<cudaStream_t>(stream));
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "CUDA kernels and NCCL point-to-point of cfg-parallel. Raw pointers in, nothing of PyTorch.";
  const auto release_gil = py::call_guard<py::gil_scoped_release>();

  py::register_exception<Error>(m, "Error", PyExc_RuntimeError);

  m.def("build_info", &build_info, "What the module was built with.");
  m.def("cuda_device_count", &cuda_device_count, "Number of visible CUDA devices; 0 without a GPU or driver.");

  py::enum_<DType>(m, "DType")
      .value("float32", DType::kFloat32)
      .value("float16", DType::kFloat16)
      .value("bfloat16", DType::kBFloat16);
  py::enum_<Numerics>(m, "Numerics").value("exact", Numerics::kExact).value("fused", Numerics::kFused);
  m.def("combine", &combine, py::arg("cond"), py::arg("uncond"), py::arg("out"), py::arg("numel"), py::arg("scale"),
        py::kw_only(), py::arg("dtype"), py::arg("numerics"), py::arg("device"), py::arg("stream"), release_gil,
        "out = uncond + scale * (cond - uncond) on raw device pointers.");

  m.def("nccl_version", &nccl_version, "NCCL's version as one number: 22809 for 2.28.9.");
  m.def(
      "nccl_unique_id",
      [] {
        NcclUniqueId id;
        {
          const py::gil_scoped_release release;  // it opens a socket
          id = nccl_unique_id();
        }
        return py::bytes(id.data(), id.size());
      },
      "128 bytes that name a new communicator; made by one rank, passed by every rank.");

  py::class_<NcclComm, std::unique_ptr<NcclComm, DeleteWithoutGil>>(m, "NcclComm")
      .def(py::init([](const py::bytes& unique_id, int rank, int world_size, int device) {
             const NcclUniqueId id = to_unique_id(unique_id);
             const py::gil_scoped_release release;
             return std::unique_ptr<NcclComm, DeleteWithoutGil>(new NcclComm(id, rank, world_size, device));
           }),
           py::arg("unique_id"), py::arg("rank"), py::arg("world_size"), py::arg("device"))
      .def(
          "send",
          [](NcclComm& self, const PyBuffers& buffers, int peer, std::uintptr_t stream) {
            self.send(to_buffers(buffers), peer, reinterpret_cast<cudaStream_t>(stream));
          },
          py::arg("buffers"), py::arg("peer"), py::arg("stream"), release_gil)
      .def(
          "recv",
          [](NcclComm& self, const PyBuffers& buffers, int peer, std::uintptr_t stream) {
            self.recv(to_buffers(buffers), peer, reinterpret_cast<cudaStream_t>(stream));
          },
          py::arg("buffers"), py::arg("peer"), py::arg("stream"), release_gil)
      .def("abort", &NcclComm::abort, release_gil)
      .def("destroy", &NcclComm::destroy, release_gil)
      .def("async_error", &NcclComm::async_error, release_gil)
      .def_property_readonly("rank", &NcclComm::rank)
      .def_property_readonly("world_size", &NcclComm::world_size)
      .def_property_readonly("device", &NcclComm::device);
}

}  // namespace cfg_parallel
