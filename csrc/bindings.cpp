// The Python face of the native module: the only file that knows pybind11. Pointers and streams arrive as integers.
#include <cuda_runtime.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "check.h"
#include "kernel_headers.h"
#include "nccl.h"
#include "peer.h"
#include "program.h"

namespace py = pybind11;

namespace cfg_parallel {
namespace {

// Freeing a communicator can wait for the network, and freeing device memory for the device; other Python threads, the
// one that would abort the wait among them, must be able to run meanwhile.
struct DeleteWithoutGil {
  template <typename T>
  void operator()(T* object) const {
    const py::gil_scoped_release release;
    delete object;
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

// (pointer, bytes, offset in the piece)
using PySegments = std::vector<std::tuple<std::uintptr_t, std::int64_t, std::int64_t>>;

std::vector<PeerSegment> to_segments(const PySegments& tuples) {
  std::vector<PeerSegment> segments;
  segments.reserve(tuples.size());
  for (const auto& [pointer, bytes, offset] : tuples) {
    segments.push_back({reinterpret_cast<void*>(pointer), bytes, offset});
  }
  return segments;
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

// (input, offset in the slot, bytes, where to keep a copy, wait): see ArrivingInput.
using PyArrivingInput = std::tuple<int, std::int64_t, std::int64_t, std::uintptr_t, PeerWait>;
// (partials, tickets, elements of a sample, blocks for each): see StatisticsArgs.
using PyStatistics = std::tuple<std::uintptr_t, std::uintptr_t, std::int64_t, int>;
using PyVariant = std::tuple<int, int, int>;  // device, width, arriving

std::optional<PyVariant> launch_program(const Program& program, const std::vector<std::uintptr_t>& inputs,
                                        const std::vector<std::uintptr_t>& outputs, const std::vector<float>& scalars,
                                        int device, std::uintptr_t stream, const std::optional<PyArrivingInput>& peer,
                                        const std::optional<PyStatistics>& sums) {
  int input = -1;
  ArrivingInput arriving{};
  if (peer) {
    input = std::get<0>(*peer);
    arriving = {.wait = std::get<4>(*peer),
                .offset = std::get<1>(*peer),
                .bytes = std::get<2>(*peer),
                .keep = reinterpret_cast<void*>(std::get<3>(*peer))};
  }
  StatisticsArgs statistics{};
  int blocks = 0;
  if (sums) {
    statistics = {.partials = reinterpret_cast<double*>(std::get<0>(*sums)),
                  .tickets = reinterpret_cast<std::uint32_t*>(std::get<1>(*sums)),
                  .per_sample = std::get<2>(*sums)};
    blocks = std::get<3>(*sums);
  }
  const std::optional<Variant> missing =
      program.launch(inputs, outputs, scalars, device, input, peer ? &arriving : nullptr, sums ? &statistics : nullptr,
                     blocks, reinterpret_cast<cudaStream_t>(stream));
  if (!missing) return std::nullopt;
  return PyVariant{missing->device, missing->width, missing->arriving};
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "CUDA kernels, NCCL point-to-point and CUDA IPC of cfg-parallel. Raw pointers in, nothing of PyTorch.";
  const auto release_gil = py::call_guard<py::gil_scoped_release>();

  py::register_exception<Error>(m, "Error", PyExc_RuntimeError);

  m.def("build_info", &build_info, "What the module was built with.");
  m.def("cuda_device_count", &cuda_device_count, "Number of visible CUDA devices; 0 without a GPU or driver.");

  m.def(
      "kernel_headers", [] { return kKernelHeaders; },
      "What the source of a program's kernel includes: the text of each header by its name.");
  py::class_<Kernel, std::shared_ptr<Kernel>>(m, "Kernel")
      .def(py::init([](const py::bytes& image, const std::string& name, int device) {
             return std::make_shared<Kernel>(std::string(image), name, device);
           }),
           py::arg("image"), py::arg("name"), py::arg("device"));
  py::class_<Program>(m, "Program")
      .def(py::init<const std::vector<std::int64_t>&, const std::vector<std::vector<std::int64_t>>&, int, int, int,
                    std::vector<int>>(),
           py::arg("sizes"), py::arg("strides"), py::arg("num_inputs"), py::arg("num_scalars"), py::arg("width"),
           py::arg("alignments"))
      .def("launch", &launch_program, py::arg("inputs"), py::arg("outputs"), py::arg("scalars"), py::arg("device"),
           py::arg("stream"), py::arg("peer") = py::none(), py::arg("statistics") = py::none(), release_gil)
      .def(
          "add",
          [](Program& self, const PyVariant& variant, std::shared_ptr<Kernel> kernel) {
            const auto& [device, width, arriving] = variant;
            self.add({.device = device, .width = width, .arriving = arriving}, std::move(kernel));
          },
          py::arg("variant"), py::arg("kernel"));

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

  py::enum_<PeerFailure>(m, "PeerFailure")
      .value("none", PeerFailure::kNone)
      .value("timeout", PeerFailure::kTimeout)
      .value("aborted", PeerFailure::kAborted)
      .value("peer_failed", PeerFailure::kPeerFailed)
      .value("broken", PeerFailure::kBroken);
  py::class_<PeerWait>(m, "PeerWait", "What a kernel needs to read the next piece where it lies; opaque.");
  m.attr("PEER_MAX_SEGMENTS") = kPeerMaxSegments;

  py::class_<PeerEndpoint, std::unique_ptr<PeerEndpoint, DeleteWithoutGil>>(m, "PeerEndpoint")
      .def(py::init([](int device, std::int64_t slot_bytes, std::int64_t chunk_bytes, int push_blocks_per_sm) {
             return std::unique_ptr<PeerEndpoint, DeleteWithoutGil>(
                 new PeerEndpoint(device, slot_bytes, chunk_bytes, push_blocks_per_sm));
           }),
           py::arg("device"), py::kw_only(), py::arg("slot_bytes"), py::arg("chunk_bytes"),
           py::arg("push_blocks_per_sm") = 2, release_gil)
      .def("handle", [](const PeerEndpoint& self) { return py::bytes(self.handle()); })
      .def("connect", &PeerEndpoint::connect, py::arg("handle"), release_gil)
      .def(
          "gate", [](PeerEndpoint& self, std::uintptr_t stream) { self.gate(reinterpret_cast<cudaStream_t>(stream)); },
          py::arg("stream"), release_gil)
      .def(
          "push",
          [](PeerEndpoint& self, const PySegments& segments, std::uintptr_t stream) {
            self.push(to_segments(segments), reinterpret_cast<cudaStream_t>(stream));
          },
          py::arg("segments"), py::arg("stream"), release_gil)
      .def(
          "pull",
          [](PeerEndpoint& self, const PySegments& segments, std::uintptr_t stream) {
            self.pull(to_segments(segments), reinterpret_cast<cudaStream_t>(stream));
          },
          py::arg("segments"), py::arg("stream"), release_gil)
      .def("wait", &PeerEndpoint::wait)
      .def("abort", &PeerEndpoint::abort)
      .def("detach", &PeerEndpoint::detach, release_gil)
      .def("close", &PeerEndpoint::close, release_gil)
      .def_property("timeout", &PeerEndpoint::timeout, &PeerEndpoint::set_timeout)
      .def_property_readonly("push_failure", &PeerEndpoint::push_failure)
      .def_property_readonly("pull_failure", &PeerEndpoint::pull_failure)
      .def_property_readonly("device", &PeerEndpoint::device)
      .def_property_readonly("slot_bytes", &PeerEndpoint::slot_bytes)
      .def_property_readonly("chunk_bytes", &PeerEndpoint::chunk_bytes);
}

}  // namespace cfg_parallel
