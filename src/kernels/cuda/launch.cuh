#pragma once

#include <cuda_runtime.h>

#include <utility>

namespace rotunda::kernels {

/// Launches a kernel that begins with ptx::wait_for_launches_before(): on Hopper and newer its blocks are made ready while the last ones
/// of the launch before it still run (programmatic dependent launch), which is worth most of a microsecond to a short kernel.
template <typename... Params, typename... Args>
cudaError_t launch_overlapped(void (*kernel)(Params...), dim3 blocks, dim3 threads, size_t shared_bytes, cudaStream_t stream, Args&&... args) {
  int device = 0;
  int major = 0;
  if (const cudaError_t error = cudaGetDevice(&device); error != cudaSuccess) return error;
  if (const cudaError_t error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device); error != cudaSuccess) return error;
  cudaLaunchAttribute overlap{};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = blocks;
  config.blockDim = threads;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &overlap;
  config.numAttrs = major >= 9 ? 1 : 0;
  if (const cudaError_t error = cudaLaunchKernelEx(&config, kernel, std::forward<Args>(args)...); error != cudaSuccess) return error;
  return cudaGetLastError();
}

}  // namespace rotunda::kernels
