#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace rotunda::bench {

/// Reads `bytes` once and keeps nothing: what decode attention cannot beat. Async on `stream`.
/// @param scratch one word of device memory
cudaError_t read_bytes(const void* from, int64_t bytes, uint32_t* scratch, int multiprocessors, cudaStream_t stream);

}  // namespace rotunda::bench
