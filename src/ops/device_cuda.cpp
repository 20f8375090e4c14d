#include "ops/device_cuda.h"

#include <ATen/Context.h>
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAFunctions.h>
#include <cuda_runtime_api.h>

#include "base/check.h"
#include "kernels/attention/plain_pages_cuda.h"

namespace rotunda::ops {

void open_cuda_device(const std::string& where, int index) {
  int n_devices = 0;
  cudaError_t error = cudaGetDeviceCount(&n_devices);
  if (error == cudaErrorInsufficientDriver) {
    int driver = 0;
    cudaDriverGetVersion(&driver);
    // A machine without any driver says the same, with version 0.
    if (driver > 0)
      throw_world_error(concat(where, ": the driver is for CUDA ", driver / 1000, ".", driver % 1000 / 10, ", expected ", CUDART_VERSION / 1000, ".",
                               CUDART_VERSION % 1000 / 10, " or newer"));
    n_devices = 0;
    error = cudaErrorNoDevice;
  }
  ROTUNDA_CHECK_WORLD(error == cudaSuccess || error == cudaErrorNoDevice, where, ": ", cudaGetErrorString(error));
  ROTUNDA_CHECK_WORLD(n_devices > 0, where, ": this machine has no GPU that CUDA can use");
  ROTUNDA_CHECK(index < n_devices, where, ": this machine has ", n_devices, " GPU", n_devices == 1 ? "" : "s", ", expected cuda:0",
                n_devices == 1 ? "" : concat(" to cuda:", n_devices - 1));
  cudaDeviceProp properties{};
  error = cudaGetDeviceProperties(&properties, index);
  ROTUNDA_CHECK_WORLD(error == cudaSuccess, where, ": ", cudaGetErrorString(error));
  ROTUNDA_CHECK_WORLD(properties.major >= 8, where, ": ", properties.name, " has compute capability ", properties.major, ".", properties.minor,
                      ", expected 8.0 or newer");
  at::globalContext().lazyInitDevice(at::kCUDA);
  c10::cuda::set_device(static_cast<c10::DeviceIndex>(index));
  error = kernels::check_device_code();
  ROTUNDA_CHECK_WORLD(error == cudaSuccess, where, ": this build has no code for ", properties.name, " (compute capability ", properties.major, ".",
                      properties.minor, "): ", cudaGetErrorString(error));
}

CudaMemory cuda_memory() {
  size_t free_bytes = 0;
  size_t total_bytes = 0;
  const cudaError_t error = cudaMemGetInfo(&free_bytes, &total_bytes);
  ROTUNDA_CHECK_WORLD(error == cudaSuccess, "CUDA: ", cudaGetErrorString(error));
  at::globalContext().lazyInitDevice(at::kCUDA);  // without it the allocator knows of no device
  const auto stats = c10::cuda::CUDACachingAllocator::getDeviceStats(c10::cuda::current_device());
  constexpr auto kAll = static_cast<size_t>(c10::CachingAllocator::StatType::AGGREGATE);
  const int64_t idle = stats.reserved_bytes[kAll].current - stats.active_bytes[kAll].current;
  return {static_cast<int64_t>(free_bytes) + idle, static_cast<int64_t>(total_bytes)};
}

}  // namespace rotunda::ops
