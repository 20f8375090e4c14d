#include "kernels/attention/plain_pages_cuda.h"
#include "kernels/cuda/element_type.cuh"

namespace rotunda::kernels {

namespace {

/// @return whether it fits; else 0 is put, since masks rely on finite numbers
template <typename T>
__device__ __forceinline__ bool put(T& to, float x) {
  const T rounded = T(x);
  const bool fits = isfinite(widen(rounded));
  to = fits ? rounded : T(0.0F);
  return fits;
}

/// Block (pair of blocks, layer).
template <typename T>
__global__ void store_kernel(const __grid_constant__ PlainPagesCuda pages, const float* key, const float* value, int64_t rows,
                             const StorePair* pairs, int32_t* refused) {
  const PlainPageLayout& l = pages.layout;
  const StorePair pair = pairs[blockIdx.x];
  const int channels = l.n_kv_heads * l.head_dim;
  const int64_t layer = blockIdx.y;
  std::byte* const page = pages.pool + pair.page * pages.page_stride + layer * pages.layer_stride;
  const int first = __ffs(static_cast<int>(pair.tokens)) - 1;
  bool fits = true;
  for (unsigned left = pair.tokens; left != 0; left &= left - 1) {
    const int t = __ffs(static_cast<int>(left)) - 1;
    const int token = 32 * pair.pair + t;
    const int64_t row = (layer * rows + pair.row + t - first) * channels;
    for (int i = static_cast<int>(threadIdx.x); i < channels; i += static_cast<int>(blockDim.x)) {
      const int head = i / l.head_dim;
      const int c = i % l.head_dim;
      T* const k = reinterpret_cast<T*>(page + l.key_block_offset(head, token / kTokenBlock));
      T* const v = reinterpret_cast<T*>(page + l.value_row_offset(head, token));
      fits = put(k[c * kTokenBlock + token % kTokenBlock], key[row + i]) && fits;
      fits = put(v[c], value[row + i]) && fits;
    }
  }
  if (!fits) refused[layer] = 1;
}

/// Block (block of tokens, kv head).
template <typename T, typename To>
__global__ void load_kernel(const __grid_constant__ PlainPagesCuda pages, const int32_t* table, To* key, To* value) {
  const PlainPageLayout& l = pages.layout;
  const int page_in_sequence = static_cast<int>(blockIdx.x) / l.blocks_per_page;
  const int block = static_cast<int>(blockIdx.x) % l.blocks_per_page;
  const int head = static_cast<int>(blockIdx.y);
  const std::byte* const page = pages.pool + table[page_in_sequence] * pages.page_stride;
  const T* const k = reinterpret_cast<const T*>(page + l.key_block_offset(head, block));
  const T* const v = reinterpret_cast<const T*>(page + l.value_row_offset(head, block * kTokenBlock));
  const int64_t at = (int64_t{head} * gridDim.x + blockIdx.x) * kTokenBlock * l.head_dim;
  for (int i = static_cast<int>(threadIdx.x); i < kTokenBlock * l.head_dim; i += static_cast<int>(blockDim.x)) {
    key[at + i] = To(widen(k[i % l.head_dim * kTokenBlock + i / l.head_dim]));
    value[at + i] = To(widen(v[i]));
  }
}

constexpr int kThreads = 256;

}  // namespace

cudaError_t store_plain_cuda(const PlainPagesCuda& pages, const float* key, const float* value, int64_t rows, int n_layers,
                             const StorePair* pairs, int n_pairs, int32_t* refused, cudaStream_t stream) {
  if (n_pairs == 0) return cudaSuccess;
  return with_type(pages.layout.type, [&]<typename T>(T) {
    store_kernel<T><<<dim3(static_cast<unsigned>(n_pairs), static_cast<unsigned>(n_layers)), kThreads, 0, stream>>>(pages, key, value, rows, pairs,
                                                                                                                  refused);
    return cudaGetLastError();
  });
}

cudaError_t load_plain_cuda(const PlainPagesCuda& pages, const int32_t* table, int n_pages, ElementType type, void* key, void* value,
                            cudaStream_t stream) {
  if (n_pages == 0) return cudaSuccess;
  const dim3 blocks(static_cast<unsigned>(n_pages * pages.layout.blocks_per_page), static_cast<unsigned>(pages.layout.n_kv_heads));
  return with_type(pages.layout.type, [&]<typename T>(T) {
    return with_type(type, [&]<typename To>(To) {
      load_kernel<T, To><<<blocks, kThreads, 0, stream>>>(pages, table, static_cast<To*>(key), static_cast<To*>(value));
      return cudaGetLastError();
    });
  });
}

}  // namespace rotunda::kernels
