#include <algorithm>

#include "kernels/attention/append_decode.cuh"
#include "kernels/attention/exact_tokens_cuda.h"
#include "kernels/cuda/element_type.cuh"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/ptx.cuh"

namespace rotunda::kernels {

namespace {

__device__ bool copy_in(const ExactPiece& piece, int slot, const float* key, const float* value, int n_kv_heads) {
  bool fits = true;
  const int channels = n_kv_heads * piece.head_dim;
  for (int i = static_cast<int>(threadIdx.x); i < channels; i += static_cast<int>(blockDim.x)) {
    fits = put(piece.key(i / piece.head_dim, slot, i % piece.head_dim), key[i]) && fits;
    fits = put(piece.value(i / piece.head_dim, slot, i % piece.head_dim), value[i]) && fits;
  }
  return fits;
}

// ---- append ----------------------------------------------------------------------------------------------------------

template <typename T, int kHeadDim>
__global__ void append_kernel(const __grid_constant__ ExactTokens exact, int layer, const __grid_constant__ DecodeAppend p) {
  ptx::wait_for_launches_before();
  append_block<T, kHeadDim>(exact, layer, p, static_cast<int>(blockDim.x) / kWarp);
}

/// Block: a sequence; one warp.
__global__ void exact_masks_kernel(const __grid_constant__ ExactTokens exact, int layer, const __grid_constant__ DecodeAppend p) {
  const int seq = static_cast<int>(blockIdx.x);
  write_exact_masks(ExactPiece(exact, layer, p.place[seq]), p, seq);
}

// ---- window ----------------------------------------------------------------------------------------------------------

/// Block (row, layer of the launch).
__global__ void read_window_kernel(const __grid_constant__ ExactTokens exact, int first_layer, const int32_t* places, const int32_t* positions,
                                   float* key, float* value) {
  const int row = static_cast<int>(blockIdx.x);
  const int layer = static_cast<int>(blockIdx.y);
  const int position = positions[row];
  const ExactPiece piece(exact, first_layer + layer, places[row]);
  const int channels = exact.n_kv_heads * exact.head_dim;
  const int64_t at = (int64_t{layer} * gridDim.x + row) * channels;
  for (int i = static_cast<int>(threadIdx.x); i < channels; i += static_cast<int>(blockDim.x)) {
    const int head = i / exact.head_dim;
    const int c = i % exact.head_dim;
    key[at + i] = position < 0 ? 0.0F : __half2float(piece.key(head, piece.window_slot(position), c));
    value[at + i] = position < 0 ? 0.0F : __half2float(piece.value(head, piece.window_slot(position), c));
  }
}

__global__ void write_window_kernel(const __grid_constant__ ExactTokens exact, int layer, int place, int64_t first, const float* key,
                                    const float* value, int32_t* refused) {
  const ExactPiece piece(exact, layer, place);
  const int64_t row = int64_t{blockIdx.x} * exact.n_kv_heads * exact.head_dim;
  if (!copy_in(piece, piece.window_slot(first + blockIdx.x), key + row, value + row, exact.n_kv_heads)) *refused = 1;
}

// ---- sinks -----------------------------------------------------------------------------------------------------------

/// Brings one layer of one sequence to the wanted sinks; all threads of a block.
/// @param key, value rows of positions first .. first + n - 1
__device__ void assign_sinks(const ExactPiece& piece, const int64_t* entries, int n_entries, int n_first, int64_t first, int64_t n, const float* key,
                             const float* value, int n_kv_heads, int32_t* refused) {
  __shared__ int64_t fresh_position[kMostSinkSlots];
  __shared__ int fresh_slot[kMostSinkSlots];
  __shared__ int n_fresh;
  if (threadIdx.x == 0) {
    n_fresh = 0;
    const int64_t first_end = n_first < first + n ? n_first : first + n;
    const auto wanted = [&](int64_t position) {
      if (position < first_end) return true;
      for (int e = 0; e < n_entries; ++e)
        if (entries[e] == position) return true;
      return false;
    };
    const auto kept = [&](int64_t position) {
      for (int slot = 0; slot < piece.sink_slots; ++slot)
        if (piece.sinks[slot] == position) return true;
      return false;
    };
    // What a slot loses in this step stays readable, for the step may be taken back: -2 until the end.
    for (int slot = 0; slot < piece.sink_slots; ++slot) {
      const int64_t position = piece.sinks[slot];
      if (position < 0 || wanted(position)) continue;
      piece.hide(position, false);
      piece.sinks[slot] = -2;
    }
    const auto take = [&](int64_t position) {
      if (position < first || position >= first + n || kept(position)) return;
      for (const int free : {-1, -2}) {
        for (int slot = 0; slot < piece.sink_slots; ++slot) {
          if (piece.sinks[slot] != free) continue;
          piece.sinks[slot] = static_cast<int32_t>(position);
          piece.hide(position, true);
          fresh_position[n_fresh] = position;
          fresh_slot[n_fresh++] = slot;
          return;
        }
      }
    };
    for (int64_t position = first; position < first_end; ++position) take(position);
    for (int e = 0; e < n_entries; ++e) take(entries[e]);
    for (int slot = 0; slot < piece.sink_slots; ++slot)
      if (piece.sinks[slot] == -2) piece.sinks[slot] = -1;
  }
  __syncthreads();
  const int64_t channels = int64_t{n_kv_heads} * piece.head_dim;
  for (int i = 0; i < n_fresh; ++i) {
    const int64_t row = (fresh_position[i] - first) * channels;
    if (!copy_in(piece, piece.window_slots + fresh_slot[i], key + row, value + row, n_kv_heads)) *refused = 1;
  }
}

__global__ void update_sinks_kernel(const __grid_constant__ ExactTokens exact, int layer, int place, const int64_t* entries, int n_entries,
                                    int n_first, int64_t first, int64_t n, const float* key, const float* value, int32_t* refused) {
  assign_sinks(ExactPiece(exact, layer, place), entries, n_entries, n_first, first, n, key, value, exact.n_kv_heads, refused);
}

/// The larger of two (magnitude, index), the lower index where they are equal.
__device__ __forceinline__ void take_larger(float& best, int& index, float other, int other_index) {
  if (other > best || (other == best && other_index < index)) best = other, index = other_index;
}

/// Block: a sequence. The largest entries of the token's row go in among the running ones, the largest first.
template <typename T>
__global__ void decode_sinks_kernel(const __grid_constant__ ExactTokens exact, int layer, const __grid_constant__ DecodeAppend p, const T* hidden,
                                    int hidden_size, int64_t hidden_stride, float* magnitudes, int64_t* entries, int n_entries, int n_first) {
  __shared__ float warp_best[32];
  __shared__ int warp_index[32];
  __shared__ float last;       // the entry taken last, and its index
  __shared__ int last_index;
  __shared__ bool more;
  const int seq = static_cast<int>(blockIdx.x);
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t state = (int64_t{p.place[seq]} * exact.n_layers + layer) * n_entries;
  float* const running = magnitudes + state;
  int64_t* const positions = entries + state;
  const T* const row = hidden + seq * hidden_stride;
  const int64_t position = p.position[seq];
  if (p.choose[seq] == 0 && position >= n_first) return;
  if (thread == 0) last = INFINITY, last_index = -1;
  const bool choose = p.choose[seq] != 0;
  for (int taken = 0; choose && taken < n_entries; ++taken) {
    __syncthreads();
    // The largest entry that comes after the last one taken.
    float best = -1;
    int index = hidden_size;
    for (int i = thread; i < hidden_size; i += static_cast<int>(blockDim.x)) {
      const float x = fabsf(widen(row[i]));
      if (x < last || (x == last && i > last_index)) take_larger(best, index, x, i);
    }
    for (int step = 1; step < 32; step *= 2)
      take_larger(best, index, __shfl_xor_sync(0xffffffffU, best, step), __shfl_xor_sync(0xffffffffU, index, step));
    __syncthreads();
    if (thread % 32 == 0) warp_best[thread / 32] = best, warp_index[thread / 32] = index;
    __syncthreads();
    if (thread == 0) {
      for (int w = 1; w < static_cast<int>(blockDim.x) / 32; ++w) take_larger(best, index, warp_best[w], warp_index[w]);
      more = best > running[n_entries - 1];
      if (more) {
        int at = n_entries - 1;
        for (; at > 0 && running[at - 1] < best; --at) running[at] = running[at - 1], positions[at] = positions[at - 1];
        running[at] = best, positions[at] = position;
        last = best, last_index = index;
      }
    }
    __syncthreads();
    if (!more) break;
  }
  const int64_t channels = int64_t{exact.n_kv_heads} * exact.head_dim;
  assign_sinks(ExactPiece(exact, layer, p.place[seq]), positions, n_entries, n_first, position, 1, p.k_turned + seq * channels,
               p.v_plain + seq * channels, exact.n_kv_heads, p.refused);
}

/// Block: a layer.
__global__ void rebuild_masks_kernel(const __grid_constant__ ExactTokens exact, int place) {
  const ExactPiece piece(exact, static_cast<int>(blockIdx.x), place);
  for (int64_t i = threadIdx.x; i < exact.mask_stride; i += blockDim.x) piece.masks[i] = 0xffffU;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int slot = 0; slot < piece.sink_slots; ++slot)
    if (piece.sinks[slot] >= 0) piece.hide(piece.sinks[slot], true);
}

/// Block (slot, kv head).
template <typename T>
__global__ void overlay_kernel(const __grid_constant__ ExactTokens exact, int layer, int place, int64_t window_first, int64_t limit, T* key,
                               T* value, int64_t rows) {
  const ExactPiece piece(exact, layer, place);
  const int slot = static_cast<int>(blockIdx.x);
  const int head = static_cast<int>(blockIdx.y);
  int64_t position;
  if (slot < piece.window_slots) {
    position = piece.window_position(slot, limit);
    if (position < window_first) return;
  } else {
    position = piece.sinks[slot - piece.window_slots];
  }
  if (position < 0 || position >= limit) return;
  const int64_t at = (int64_t{head} * rows + position) * exact.head_dim;
  for (int c = static_cast<int>(threadIdx.x); c < exact.head_dim; c += static_cast<int>(blockDim.x)) {
    key[at + c] = T(__half2float(piece.key(head, slot, c)));
    value[at + c] = T(__half2float(piece.value(head, slot, c)));
  }
}

constexpr int kThreads = 256;

}  // namespace

cudaError_t append_decode_cuda(const ExactTokens& exact, int layer, const DecodeAppend& params, ElementType type, cudaStream_t stream) {
  const int blocks = exact.n_kv_heads * params.batch;
  const int warps = std::min(params.n_q + 2, 8);
  return with_type(type, [&]<typename T>(T) {
    const auto kernel = exact.head_dim == 64    ? &append_kernel<T, 64>
                        : exact.head_dim == 128 ? &append_kernel<T, 128>
                        : exact.head_dim == 256 ? &append_kernel<T, 256>
                                                : nullptr;
    if (kernel == nullptr) return cudaErrorInvalidValue;
    return launch_overlapped(kernel, blocks, warps * kWarp, 0, stream, exact, layer, params);
  });
}

cudaError_t exact_masks_cuda(const ExactTokens& exact, int layer, const DecodeAppend& params, cudaStream_t stream) {
  if (exact.window_blocks + exact.sink_blocks == 0) return cudaSuccess;
  exact_masks_kernel<<<static_cast<unsigned>(params.batch), 32, 0, stream>>>(exact, layer, params);
  return cudaGetLastError();
}

cudaError_t read_window_cuda(const ExactTokens& exact, int first_layer, int n_layers, const int32_t* place, const int32_t* position, int n,
                             float* key, float* value, cudaStream_t stream) {
  if (n == 0) return cudaSuccess;
  read_window_kernel<<<dim3(static_cast<unsigned>(n), static_cast<unsigned>(n_layers)), kThreads, 0, stream>>>(exact, first_layer, place,
                                                                                                             position, key, value);
  return cudaGetLastError();
}

cudaError_t write_window_cuda(const ExactTokens& exact, int layer, int place, int64_t first, int64_t n, const float* key, const float* value,
                              int32_t* refused, cudaStream_t stream) {
  if (n == 0) return cudaSuccess;
  write_window_kernel<<<static_cast<unsigned>(n), kThreads, 0, stream>>>(exact, layer, place, first, key, value, refused);
  return cudaGetLastError();
}

cudaError_t update_sinks_cuda(const ExactTokens& exact, int layer, int place, const int64_t* entries, int n_entries, int n_first,
                              int64_t first, int64_t n, const float* key, const float* value, int32_t* refused, cudaStream_t stream) {
  if (exact.sink_blocks * kTokenBlock > kMostSinkSlots) return cudaErrorInvalidValue;
  update_sinks_kernel<<<1, kThreads, 0, stream>>>(exact, layer, place, entries, n_entries, n_first, first, n, key, value, refused);
  return cudaGetLastError();
}

cudaError_t update_decode_sinks_cuda(const ExactTokens& exact, int layer, const DecodeAppend& params, ElementType type, const void* hidden,
                                     int hidden_size, int64_t hidden_stride, float* magnitudes, int64_t* entries, int n_entries, int n_first,
                                     cudaStream_t stream) {
  if (exact.sink_blocks * kTokenBlock > kMostSinkSlots) return cudaErrorInvalidValue;
  return with_type(type, [&]<typename T>(T) {
    decode_sinks_kernel<T><<<static_cast<unsigned>(params.batch), kThreads, 0, stream>>>(
        exact, layer, params, static_cast<const T*>(hidden), hidden_size, hidden_stride, magnitudes, entries, n_entries, n_first);
    return cudaGetLastError();
  });
}

cudaError_t rebuild_masks_cuda(const ExactTokens& exact, int place, cudaStream_t stream) {
  rebuild_masks_kernel<<<static_cast<unsigned>(exact.n_layers), kThreads, 0, stream>>>(exact, place);
  return cudaGetLastError();
}

cudaError_t overlay_exact_cuda(const ExactTokens& exact, int layer, int place, int64_t window_first, int64_t limit, void* key, void* value,
                               int64_t rows, ElementType type, cudaStream_t stream) {
  const int slots = (exact.window_blocks + exact.sink_blocks) * kTokenBlock;
  if (slots == 0 || limit == 0) return cudaSuccess;
  const dim3 blocks(static_cast<unsigned>(slots), static_cast<unsigned>(exact.n_kv_heads));
  return with_type(type, [&]<typename T>(T) {
    overlay_kernel<T><<<blocks, 64, 0, stream>>>(exact, layer, place, window_first, limit, static_cast<T*>(key), static_cast<T*>(value), rows);
    return cudaGetLastError();
  });
}

}  // namespace rotunda::kernels
