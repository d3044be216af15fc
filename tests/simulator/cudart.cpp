// Replaces the CUDA runtime: the functions that the extension and its kernels call, and those that Python calls.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <unordered_map>
#include <utility>

#include "engine.h"

using namespace simulator;

namespace {

// Prepares a kernel by name: Python decodes it and sets the memory that it may access. Null: Python has set the reason.
using Prepare = const Kernel* (*)(const char* name);

struct Configuration {
  dim3 blocks, threads;
  size_t shared;
  cudaStream_t stream;
};

Prepare prepare = nullptr;
int driver = 13000;  // its CUDA version
std::string reason;  // of the last error
cudaError_t last = cudaSuccess;
Configuration pushed;

std::unordered_map<const void*, std::string>& names() {
  static std::unordered_map<const void*, std::string> names;
  return names;
}

int attempt(const Kernel* kernel, int64_t blocks, int64_t threads, void** arguments) {
  try {
    if (kernel != nullptr) run(*kernel, blocks, threads, arguments);
    return kernel == nullptr;
  } catch (const Fault& fault) {
    reason = fault.what();
    return 1;
  }
}

}  // namespace

extern "C" {

int simulator_operation(const char* name) {
  const auto& all = operations();
  const auto found = std::find_if(all.begin(), all.end(), [&](const Operation& o) { return o.name == name; });
  return found == all.end() ? -1 : static_cast<int>(found - all.begin());
}
void simulator_prepare(Prepare function) { prepare = function; }
void simulator_refuse(const char* text) { reason = text; }
const char* simulator_reason() { return reason.c_str(); }
void simulator_options(int backward, int nudge) { device().options = {backward, nudge}; }
void simulator_driver(int version) { driver = version; }
uint64_t simulator_steps() { return device().steps; }
void simulator_ranges(const Range* ranges, int count) {
  device().ranges.assign(ranges, ranges + count);
  device().shadows.assign(count, {});
}
int simulator_run(const Kernel* kernel, int64_t blocks, int64_t threads, void** arguments) {
  return attempt(kernel, blocks, threads, arguments);
}

void** __cudaRegisterFatBinary(void*) {
  static void* handle;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*,
                            int*) {
  names()[host] = name;
}
unsigned __cudaPushCallConfiguration(dim3 blocks, dim3 threads, size_t shared, CUstream_st* stream) {
  pushed = {blocks, threads, shared, stream};
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* blocks, dim3* threads, size_t* shared, void* stream) {
  *blocks = pushed.blocks;
  *threads = pushed.threads;
  *shared = pushed.shared;
  *static_cast<cudaStream_t*>(stream) = pushed.stream;
  return cudaSuccess;
}
cudaError_t cudaLaunchKernel(const void* host, dim3 blocks, dim3 threads, void** arguments, size_t shared,
                             cudaStream_t) {
  const auto name = names().find(host);
  if (name == names().end()) return last = cudaErrorInvalidDeviceFunction;
  // Rejects what a device rejects, and more than one dimension, which the project does not use.
  if (blocks.x == 0 || blocks.x > 0x7fffffff || blocks.y * blocks.z != 1 || threads.x == 0 || threads.x > 1024 ||
      threads.y * threads.z != 1 || shared != 0) {
    reason = "the geometry of a launch of " + name->second;
    return last = cudaErrorInvalidConfiguration;
  }
  const char* text = name->second.c_str();
  return last = attempt(prepare(text), blocks.x, threads.x, arguments) != 0 ? cudaErrorIllegalAddress : cudaSuccess;
}
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* host) {
  *kernel = static_cast<cudaKernel_t>(const_cast<void*>(host));
  return cudaSuccess;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 blocks, dim3 threads, void** arguments, size_t shared,
                               cudaStream_t stream) {
  return cudaLaunchKernel(kernel, blocks, threads, arguments, shared, stream);
}
cudaError_t cudaGetLastError() { return std::exchange(last, cudaSuccess); }
const char* cudaGetErrorName(cudaError_t error) { return error == cudaErrorIllegalAddress ? "a fault" : "refused"; }
const char* cudaGetErrorString(cudaError_t) { return reason.c_str(); }
cudaError_t cudaDriverGetVersion(int* version) {
  *version = driver;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int index) { return index == 0 ? cudaSuccess : cudaErrorInvalidDevice; }
cudaError_t cudaGetDevice(int* index) {
  *index = 0;
  return cudaSuccess;
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* host) {
  *attributes = {};
  return names().count(host) != 0 ? cudaSuccess : cudaErrorInvalidDeviceFunction;
}
}
