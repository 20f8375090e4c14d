#include "kv/house/kernels/house_decode_dispatch.cuh"

namespace rotunda::kv::house {

template cudaError_t house_dispatch_value_bits<2>(kernels::PagedTask, const PagedDecode&, int, kernels::PagedDecodeGrid&, cudaStream_t);

}  // namespace rotunda::kv::house
