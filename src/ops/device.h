#pragma once

#include <c10/core/Device.h>
#include <c10/util/Exception.h>

#include <cstdint>
#include <string>

#include "base/error.h"

namespace rotunda::ops {

/// The device by the name that users give it: "cpu", "cuda" (the first GPU) or "cuda:N". @throws Error{kUser} for another name
at::Device parse_device(const std::string& name);

/// Throws unless tensors and kernels of this build can run on the device; a GPU is then the current one of this thread.
/// @throws Error{kUser} where the build has no CUDA half or the machine no GPU of this number; Error{kWorld} for no driver or an old one,
///   no GPU, a GPU older than compute capability 8.0 or one that this build has no code for
void require_device(at::Device device);

/// What a device is called; "cpu" for the processor.
std::string device_name(at::Device device);
/// All memory of a GPU.
int64_t total_memory_bytes(at::Device device);
/// Bytes that can still be allocated: of the machine's memory; of a GPU's what is free or kept for reuse by this process, and at most
/// what is left of the budget.
/// @param budget_bytes of a GPU's memory for this process; 0: all that it has
int64_t available_memory_bytes(at::Device device, int64_t budget_bytes = 0);

/// Waits for all that was launched on the device; for clocks.
void synchronize(at::Device device);

/// LibTorch's exceptions in our terms, in one line: memory that ran out (naming the bytes) and errors of the GPU are the world's fault, all
/// else is ours.
Error as_error(const c10::Error& error);

}  // namespace rotunda::ops
