#pragma once

#include <cuda_runtime_api.h>

namespace rotunda::kernels {

/// Whether the current device can run this build's kernels. @return cudaErrorNoKernelImageForDevice where the build has no code for it
cudaError_t probe_cuda();

}  // namespace rotunda::kernels
