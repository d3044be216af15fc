// The cuda backend: launches on a stream. Addresses and streams are passed as integers, so it needs no torch header and
// one build works with every torch version; cudart is linked statically, so the module imports without a driver.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "../export.h"
#include "kernels.h"
#include "plan.h"

namespace py = pybind11;

namespace drift {
namespace {

// Throws if `error` is set, naming the call that failed, and clears the error so that the next call does not see it.
void check(cudaError_t error, const std::string& call) {
  if (error == cudaSuccess) return;
  cudaGetLastError();
  throw std::runtime_error(call + " failed: " + cudaGetErrorName(error) + ": " + cudaGetErrorString(error));
}

struct Target {
  Plan plan;
  DTypes dtypes;
  int device;
  cudaStream_t stream;
};

void launch_on(const Target& target, ChunkKernel kernel, const std::string& name, const Coefficients* coefficients,
               const SumSpace& sums = {}) {
  if (kernel == nullptr) throw std::invalid_argument("the cuda backend has no " + name + " kernel for these dtypes");
  check(cudaSetDevice(target.device), "cudaSetDevice");
  for_each_launch(target.plan, coefficients, sums, [&](const Launch& launch, int64_t chunks) {
    check(launch_chunks(kernel, launch, chunks, target.stream), "launching " + name);
  });
}

void update(const Target& target, uint64_t coefficients) {
  const py::gil_scoped_release release;  // a full launch queue blocks
  launch_on(target, update_kernel(target.dtypes), "update", pointer<const Coefficients>(coefficients));
}

void bias(const Target& target, uint64_t coefficients) {
  const py::gil_scoped_release release;
  launch_on(target, bias_kernel(target.dtypes), "bias", pointer<const Coefficients>(coefficients));
}

void grad_stats(const Target& target, uint64_t partials, uint64_t arrived, uint64_t out) {
  const py::gil_scoped_release release;
  launch_on(target, sum_kernel(target.dtypes), "grad_stats", nullptr,
            {pointer<Sums>(partials), pointer<Sums>(out), pointer<uint32_t>(arrived)});
}

// `words` is a Filling followed by its groups.
void fill_coefficients(uint64_t words, int device, uint64_t stream) {
  const py::gil_scoped_release release;
  const auto* filling = pointer<const Filling>(words);
  if (filling->groups > kMaxGroups) throw std::invalid_argument("more groups than a kernel's parameters hold");
  check(cudaSetDevice(device), "cudaSetDevice");
  check(launch_fill(*filling, pointer<const Group>(words + sizeof(Filling)), pointer<CUstream_st>(stream)),
        "launching fill_coefficients");
}

// Loads every kernel that a target may launch; skips kernels that do not exist for its dtypes.
void load_kernels(const Target& target) {
  const py::gil_scoped_release release;
  check(cudaSetDevice(target.device), "cudaSetDevice");
  for (const ChunkKernel kernel :
       {update_kernel(target.dtypes), sum_kernel(target.dtypes), bias_kernel(target.dtypes)}) {
    if (kernel != nullptr) check(load(kernel), "loading a kernel");
  }
  check(load_fill(), "loading a kernel");
}

// A launch has up to 32,764 bytes of parameters. An older driver may load a kernel with fewer, but not launch this one.
constexpr int kOldestDriver = 12010;

// Why a driver of this CUDA version, as cudaDriverGetVersion returns it, cannot run the launches; None if it can.
std::optional<std::string> wrong_driver(int version) {
  if (version >= kOldestDriver) return std::nullopt;
  if (version == 0) return "there is no CUDA driver";
  return "its launches need an NVIDIA driver for CUDA 12.1 or newer, and this one is for CUDA " +
         std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10) + ": update the driver";
}

// Why the device cannot run the kernels; None if it can.
std::optional<std::string> unusable(int device) {
  try {
    int driver, current;
    check(cudaDriverGetVersion(&driver), "cudaDriverGetVersion");
    if (auto reason = wrong_driver(driver)) return reason;
    check(cudaGetDevice(&current), "cudaGetDevice");
    check(cudaSetDevice(device), "cudaSetDevice");
    const cudaError_t error = load_fill();  // any kernel will do: a device can run all of them or none
    check(cudaSetDevice(current), "cudaSetDevice");
    check(error, "loading the kernels");
    return std::nullopt;
  } catch (const std::runtime_error& error) {
    return error.what();
  }
}

}  // namespace
}  // namespace drift

PYBIND11_MODULE(_cuda, m) {
  using namespace drift;
  export_layout(m);
  m.def("unusable", &unusable, py::arg("device"));
  py::class_<Target>(m, "Target")
      .def(py::init([](uint64_t rows, uint64_t device_rows, uint64_t chunk_rows, uint64_t grads, int64_t count,
                       const DTypeNames& dtypes, int device, uint64_t stream) {
             const Plan plan{pointer<const Row>(rows), pointer<const Row>(device_rows),
                             pointer<const int32_t>(chunk_rows), pointer<const uint64_t>(grads), count};
             return Target{plan, parse_dtypes(dtypes), device, pointer<CUstream_st>(stream)};
           }),
           py::arg("rows"), py::arg("device_rows"), py::arg("chunk_rows"), py::arg("grads"), py::arg("count"),
           py::arg("dtypes"), py::arg("device"), py::arg("stream"));
  m.def("update", &update, py::arg("target"), py::arg("coefficients"));
  m.def("bias", &bias, py::arg("target"), py::arg("coefficients"));
  m.def("grad_stats", &grad_stats, py::arg("target"), py::arg("partials"), py::arg("arrived"), py::arg("out"));
  m.def("fill_coefficients", &fill_coefficients, py::arg("words"), py::arg("device"), py::arg("stream"));
  m.def("load_kernels", &load_kernels, py::arg("target"));
}
