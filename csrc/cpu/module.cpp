// The cpu backend: OpenMP over chunks. Addresses are passed as integers, so it needs no torch header and one build
// works with every torch version.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <vector>

#include "../export.h"
#include "describe.h"
#include "kernels.h"
#include "threads.h"

namespace py = pybind11;

namespace drift {
namespace {

std::vector<const InstructionSet*> supported() {
  std::vector<const InstructionSet*> sets{&kBaseline};
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2")) sets.push_back(&kAvx2);
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    sets.push_back(&kAvx512);
  }
#endif
  return sets;
}

const InstructionSet* selected = supported().back();

void select_instruction_set(const std::string& name) {
  for (const InstructionSet* set : supported()) {
    if (set->name == name) {
      selected = set;
      return;
    }
  }
  throw std::invalid_argument("this machine does not support the instruction set " + name);
}

struct Launch {
  const Row* rows;
  const uint64_t* grads;
  int64_t count;
  DTypes dtypes;
  int threads;
};

// Runs the kernel on every chunk, with the coefficients of its tensor.
void run(const Launch& launch, UpdateKernel kernel, const std::string& name, uint64_t coefficients) {
  if (kernel == nullptr) throw std::invalid_argument("the cpu backend has no " + name + " kernel for these dtypes");
  const auto* c = pointer<const Coefficients>(coefficients);
  const py::gil_scoped_release release;
  for_each_chunk(launch.rows, launch.count, launch.threads, [&](int64_t tensor, int64_t, int64_t begin, int64_t end) {
    kernel(launch.rows[tensor], launch.grads[tensor], c[tensor], begin, end);
  });
}

void update(const Launch& launch, uint64_t coefficients) {
  run(launch, selected->update(launch.dtypes), "update", coefficients);
}

void bias(const Launch& launch, uint64_t coefficients) {
  run(launch, selected->bias(launch.dtypes), "bias", coefficients);
}

// Two stages: each chunk's sums into `partials`, then the sums per tensor, in the order of its chunks.
void grad_stats(const Launch& launch, uint64_t partials, uint64_t out) {
  const SumKernel kernel = selected->sum(launch.dtypes);
  if (kernel == nullptr) throw std::invalid_argument("the cpu backend has no grad_stats kernel for these dtypes");
  auto* partial = pointer<Sums>(partials);
  auto* sums = pointer<Sums>(out);
  const py::gil_scoped_release release;
  for_each_chunk(launch.rows, launch.count, launch.threads,
                 [&](int64_t tensor, int64_t chunk, int64_t begin, int64_t end) {
                   partial[chunk] = kernel(launch.rows[tensor], launch.grads[tensor], begin, end);
                 });
  for (int64_t t = 0; t < launch.count; ++t) {
    sums[t] = {0.0, 0.0};
    const int64_t first = launch.rows[t].first_chunk;
    for (int64_t chunk = first; chunk < first + chunk_count(launch.rows[t].numel); ++chunk) {
      sums[t].grad_grad += partial[chunk].grad_grad;
      sums[t].grad_delta += partial[chunk].grad_delta;
    }
  }
}

// Writes the delta; returns <expert, expert>, <expert, base>, <base, base> and <delta, delta>.
std::tuple<double, double, double, double> subtract(uint64_t expert, uint64_t base, uint64_t origin, uint64_t delta,
                                                    int64_t count, const std::string& weight_dtype,
                                                    const std::string& delta_dtype) {
  const SubtractKernel kernel = selected->subtract(parse_dtype(weight_dtype), parse_dtype(delta_dtype));
  if (kernel == nullptr) throw std::invalid_argument("the cpu backend has no subtract kernel for these dtypes");
  const py::gil_scoped_release release;
  const FloatEnvironment environment;
  const Products p = kernel(expert, base, origin, delta, count);
  return {p.expert_expert, p.expert_base, p.base_base, p.delta_delta};
}

void sum_words(uint64_t words, int64_t rows, int64_t width, uint64_t row_sums, uint64_t columns) {
  const py::gil_scoped_release release;
  selected->words(pointer<const uint64_t>(words), rows, width, pointer<uint64_t>(row_sums), pointer<uint64_t>(columns));
}

}  // namespace
}  // namespace drift

PYBIND11_MODULE(_cpu, m) {
  using namespace drift;
  export_layout(m);
  m.def("instruction_sets", [] {
    std::vector<std::string> names;
    for (const InstructionSet* set : supported()) names.emplace_back(set->name);
    return names;
  });
  m.def("select_instruction_set", &select_instruction_set);
  py::class_<Launch>(m, "Launch")
      .def(py::init([](uint64_t rows, uint64_t grads, int64_t count, const DTypeNames& dtypes, int threads) {
             return Launch{pointer<const Row>(rows), pointer<const uint64_t>(grads), count, parse_dtypes(dtypes),
                           threads};
           }),
           py::arg("rows"), py::arg("grads"), py::arg("count"), py::arg("dtypes"), py::arg("threads"));
  m.def("update", &update, py::arg("launch"), py::arg("coefficients"));
  m.def("bias", &bias, py::arg("launch"), py::arg("coefficients"));
  m.def("grad_stats", &grad_stats, py::arg("launch"), py::arg("partials"), py::arg("out"));
  m.def("subtract", &subtract, py::arg("expert"), py::arg("base"), py::arg("origin"), py::arg("delta"),
        py::arg("count"), py::arg("weight_dtype"), py::arg("delta_dtype"));
  export_describe(m);
  m.def("sum_words", &sum_words, py::arg("words"), py::arg("rows"), py::arg("width"), py::arg("row_sums"),
        py::arg("columns"));
}
