#pragma once

#include "kernels/attention/paged_decode_launch.cuh"
#include "kv/house/kernels/house_page_codec.cuh"

namespace rotunda::kv::house {

inline constexpr int kHouseStages = 3;

template <int kKeyBits, int kValueBits, int kHeadDim>
struct HousePages {
  template <int kSets>
  using Codec = HousePageCodec<kKeyBits, kValueBits, kHeadDim, kSets>;
};

template <int kKeyBits, int kValueBits>
cudaError_t house_dispatch_head_dim(kernels::PagedTask task, const PagedDecode& p, kernels::PagedDecodeGrid& grid, cudaStream_t stream) {
  const auto run = [&]<int kHeadDim>() {
    return kernels::dispatch_size<HousePages<kKeyBits, kValueBits, kHeadDim>::template Codec, kHeadDim, kHouseStages>(task, p, grid, stream);
  };
  switch (p.head_dim) {
    case 64: return run.template operator()<64>();
    case 128: return run.template operator()<128>();
    case 256: return run.template operator()<256>();
    default: return cudaErrorInvalidValue;
  }
}

/// Kernels of one number of key bits, each in a source of its own: they take the compiler a minute.
template <int kKeyBits>
cudaError_t house_dispatch_value_bits(kernels::PagedTask task, const PagedDecode& p, int value_bits, kernels::PagedDecodeGrid& grid,
                                      cudaStream_t stream) {
  switch (value_bits) {
    case 2: return house_dispatch_head_dim<kKeyBits, 2>(task, p, grid, stream);
    case 3: return house_dispatch_head_dim<kKeyBits, 3>(task, p, grid, stream);
    case 4: return house_dispatch_head_dim<kKeyBits, 4>(task, p, grid, stream);
    default: return cudaErrorInvalidValue;
  }
}

extern template cudaError_t house_dispatch_value_bits<2>(kernels::PagedTask, const PagedDecode&, int, kernels::PagedDecodeGrid&, cudaStream_t);
extern template cudaError_t house_dispatch_value_bits<3>(kernels::PagedTask, const PagedDecode&, int, kernels::PagedDecodeGrid&, cudaStream_t);
extern template cudaError_t house_dispatch_value_bits<4>(kernels::PagedTask, const PagedDecode&, int, kernels::PagedDecodeGrid&, cudaStream_t);

}  // namespace rotunda::kv::house
