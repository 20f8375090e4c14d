#pragma once

#include <cuda_runtime_api.h>

#include "kernels/attention/decode_attention.h"
#include "kernels/nn/nn_params.h"

namespace rotunda::kernels {

/// Both: elements of any ElementType, rounded as nn_ref.h says, sums in fp32 in an order that does not depend on the launch. Pointers
/// and rows aligned to 16 bytes are read 16 bytes at a time, others element by element. Async on `stream`; allocate nothing.
cudaError_t rms_norm_cuda(const RmsNorm& params, ElementType type, cudaStream_t stream);
cudaError_t swiglu_cuda(const Swiglu& params, ElementType type, cudaStream_t stream);

}  // namespace rotunda::kernels
