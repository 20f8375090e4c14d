#pragma once

#include <c10/core/Device.h>

#include <cstdint>
#include <string>

namespace rotunda::ops {

/// Where to compute: "cpu", "cuda" (the first GPU) or "cuda:N". A GPU becomes the calling thread's current one.
/// @param where what the text is the value of, for messages: "--device"
/// @throws Error{kUser} for another text, a build without CUDA or a GPU that is not there; Error{kWorld} where the driver or the GPU is too old
at::Device open_device(const std::string& where, const std::string& text);

/// Bytes that may still be allocated on a device.
/// @param budget_bytes of a GPU's memory, counting what is allocated already; 0: all of it
int64_t available_bytes(at::Device device, int64_t budget_bytes);

/// All of a device's memory.
int64_t total_bytes(at::Device device);

}  // namespace rotunda::ops
