#include "ops/device_cuda.h"

#include <ATen/Context.h>
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAGuard.h>
#include <cuda_runtime_api.h>

#include "base/check.h"
#include "kernels/cuda/probe_cuda.h"

namespace rotunda::ops::cuda {

namespace {

// CUDA's versions are numbers such as 13020: 13.2.
std::string version(int number) { return concat(number / 1000, ".", number % 1000 / 10); }

cudaDeviceProp properties(at::Device device) {
  cudaDeviceProp properties{};
  C10_CUDA_CHECK(cudaGetDeviceProperties(&properties, device.index()));
  return properties;
}

using DeviceStats = c10::CachingDeviceAllocator::DeviceStats;

// Of LibTorch's allocator, which is made with the first tensor or here.
DeviceStats allocator_stats(at::Device device) {
  at::globalContext().lazyInitDevice(c10::DeviceType::CUDA);
  return c10::cuda::CUDACachingAllocator::getDeviceStats(device.index());
}

int64_t current(const c10::CachingAllocator::StatArray& stat) {
  return stat[static_cast<size_t>(c10::CachingAllocator::StatType::AGGREGATE)].current;
}

}  // namespace

void require_device(at::Device device) {
  int n_devices = 0;
  const cudaError_t error = cudaGetDeviceCount(&n_devices);
  cudaGetLastError();  // else the next check anywhere would report it again
  if (error == cudaErrorInsufficientDriver) {
    int driver = 0;
    int runtime = 0;
    cudaDriverGetVersion(&driver);
    cudaRuntimeGetVersion(&runtime);
    ROTUNDA_CHECK_WORLD(driver != 0, "--device ", device, ": this machine has no NVIDIA driver");
    throw_world_error(concat("--device ", device, ": the NVIDIA driver is of CUDA ", version(driver), ", expected one of CUDA ",
                             version(runtime), " or newer"));
  }
  ROTUNDA_CHECK_WORLD(error == cudaSuccess || error == cudaErrorNoDevice, "--device ", device, ": ", cudaGetErrorString(error));
  ROTUNDA_CHECK_WORLD(error == cudaSuccess && n_devices > 0, "--device ", device, ": this machine has no GPU");
  ROTUNDA_CHECK(device.index() < n_devices, "--device ", device, ": this machine has ", n_devices, " GPU", n_devices == 1 ? "" : "s",
                ", expected cuda:", n_devices - 1, " at most");
  const cudaDeviceProp gpu = properties(device);
  ROTUNDA_CHECK_WORLD(gpu.major >= 8, "--device ", device, ": ", gpu.name, " has compute capability ", gpu.major, ".", gpu.minor,
                      ", expected 8.0 (Ampere) or newer");
  c10::cuda::set_device(device.index());
  const cudaError_t loaded = kernels::probe_cuda();
  cudaGetLastError();
  ROTUNDA_CHECK_WORLD(loaded != cudaErrorNoKernelImageForDevice, "--device ", device, ": this build has no code for ", gpu.name,
                      " (compute capability ", gpu.major, ".", gpu.minor, "); build it with CMAKE_CUDA_ARCHITECTURES=", gpu.major,
                      gpu.minor);
  ROTUNDA_CHECK_WORLD(loaded == cudaSuccess, "--device ", device, ": ", gpu.name, ": ", cudaGetErrorString(loaded));
}

void synchronize(at::Device device) {
  const c10::cuda::CUDAGuard guard(device);
  c10::cuda::device_synchronize();
}

std::string device_name(at::Device device) { return properties(device).name; }

int64_t total_memory_bytes(at::Device device) { return static_cast<int64_t>(properties(device).totalGlobalMem); }

int64_t free_memory_bytes(at::Device device) {
  const c10::cuda::CUDAGuard guard(device);
  size_t free_bytes = 0;
  size_t total_bytes = 0;
  C10_CUDA_CHECK(cudaMemGetInfo(&free_bytes, &total_bytes));
  const DeviceStats stats = allocator_stats(device);
  return static_cast<int64_t>(free_bytes) + current(stats.reserved_bytes) - current(stats.allocated_bytes);
}

int64_t allocated_bytes(at::Device device) { return current(allocator_stats(device).allocated_bytes); }

}  // namespace rotunda::ops::cuda
