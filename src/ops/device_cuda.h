#pragma once

#include <cstdint>
#include <string>

namespace rotunda::ops {

/// Makes GPU `index` the current one after looking whether our kernels run on it. @throws as open_device()
void open_cuda_device(const std::string& where, int index);

struct CudaMemory {
  int64_t free_bytes;  ///< LibTorch's idle blocks included
  int64_t total_bytes;
};
/// Of the current GPU.
CudaMemory cuda_memory();

}  // namespace rotunda::ops
