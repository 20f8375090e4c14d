#include "kernels/cuda/probe_cuda.h"

namespace rotunda::kernels {

namespace {

__global__ void probe_kernel() {}

}  // namespace

cudaError_t probe_cuda() {
  cudaFuncAttributes attributes;
  return cudaFuncGetAttributes(&attributes, probe_kernel);
}

}  // namespace rotunda::kernels
