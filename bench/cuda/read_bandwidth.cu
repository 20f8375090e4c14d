#include "cuda/read_bandwidth.h"

namespace rotunda::bench {

namespace {

__global__ void read_all(const uint4* from, int64_t n, uint32_t* never) {
  const int64_t step = int64_t{gridDim.x} * blockDim.x;
  uint32_t all = 0;
  int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  for (; i + 3 * step < n; i += 4 * step) {
    const uint4 a = __ldcs(from + i);
    const uint4 b = __ldcs(from + i + step);
    const uint4 c = __ldcs(from + i + 2 * step);
    const uint4 d = __ldcs(from + i + 3 * step);
    all |= (a.x ^ a.y ^ a.z ^ a.w) | (b.x ^ b.y ^ b.z ^ b.w) | (c.x ^ c.y ^ c.z ^ c.w) | (d.x ^ d.y ^ d.z ^ d.w);
  }
  for (; i < n; i += step) {
    const uint4 a = __ldcs(from + i);
    all |= a.x ^ a.y ^ a.z ^ a.w;
  }
  if (all == 0x13579bdfU) *never = all;  // so that the loads are not left out
}

}  // namespace

cudaError_t read_bytes(const void* from, int64_t bytes, uint32_t* scratch, int multiprocessors, cudaStream_t stream) {
  read_all<<<static_cast<unsigned>(multiprocessors * 4), 512, 0, stream>>>(static_cast<const uint4*>(from), bytes / 16, scratch);
  return cudaGetLastError();
}

}  // namespace rotunda::bench
