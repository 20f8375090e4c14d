#pragma once

#include <c10/core/Device.h>

#include <cstdint>
#include <string>

/// The half of ops/device.h that asks the CUDA runtime; only in builds with a CUDA half.
namespace rotunda::ops::cuda {

void require_device(at::Device device);
void synchronize(at::Device device);
std::string device_name(at::Device device);
int64_t total_memory_bytes(at::Device device);
/// Free, or kept for reuse by LibTorch's allocator.
int64_t free_memory_bytes(at::Device device);
/// In tensors of this process.
int64_t allocated_bytes(at::Device device);

}  // namespace rotunda::ops::cuda
