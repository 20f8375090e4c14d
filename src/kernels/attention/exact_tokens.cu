#include "kernels/attention/exact_tokens_cuda.h"
#include "kernels/cuda/element_type.cuh"

namespace rotunda::kernels {

namespace {

/// The exact tokens of one place and layer.
struct Piece {
  __half* keys;
  __half* values;
  int32_t* sinks;   ///< positions by sink slot
  uint16_t* masks;  ///< of pages
  int head_dim;
  int blocks;
  int window_slots;
  int sink_slots;

  __device__ Piece(const ExactTokens& e, int layer, int place)
      : head_dim(e.head_dim),
        blocks(e.window_blocks + e.sink_blocks),
        window_slots(e.window_blocks * kTokenBlock),
        sink_slots(e.sink_blocks * kTokenBlock) {
    keys = reinterpret_cast<__half*>(e.bytes + place * e.place_stride + layer * e.layer_stride);
    values = keys + int64_t{e.n_kv_heads} * blocks * kTokenBlock * head_dim;
    sinks = e.sink_positions + (int64_t{place} * e.n_layers + layer) * sink_slots;
    masks = e.page_masks + (int64_t{layer} * e.n_places + place) * e.mask_stride;
  }

  __device__ __half& key(int head, int slot, int c) const {
    return keys[((int64_t{head} * blocks + slot / kTokenBlock) * head_dim + c) * kTokenBlock + slot % kTokenBlock];
  }
  __device__ __half& value(int head, int slot, int c) const {
    return values[(int64_t{head} * blocks * kTokenBlock + slot) * head_dim + c];
  }
  __device__ int window_slot(int64_t position) const { return static_cast<int>(position % window_slots); }

  /// What the slot holds as the sequence ends before `kv_len`: the newest position that lies in it; negative: none.
  __device__ int64_t window_position(int slot, int64_t kv_len) const {
    return kv_len - 1 - (kv_len - 1 - slot + int64_t{window_slots}) % window_slots;
  }

  __device__ void hide(int64_t position, bool hidden) const {
    const auto bit = static_cast<uint16_t>(1U << (position % kTokenBlock));
    uint16_t& entry = masks[position / kTokenBlock];
    entry = static_cast<uint16_t>(hidden ? entry & ~bit : entry | bit);
  }
};

/// @return whether it fits; else 0 is put, since masks rely on finite numbers
__device__ __forceinline__ bool put(__half& to, float x) {
  const __half rounded = __float2half_rn(x);
  const bool fits = (__half_as_ushort(rounded) & 0x7c00U) != 0x7c00U;
  to = fits ? rounded : __half(0.0F);
  return fits;
}

__device__ bool copy_in(const Piece& piece, int slot, const float* key, const float* value, int n_kv_heads) {
  bool fits = true;
  const int channels = n_kv_heads * piece.head_dim;
  for (int i = static_cast<int>(threadIdx.x); i < channels; i += static_cast<int>(blockDim.x)) {
    fits = put(piece.key(i / piece.head_dim, slot, i % piece.head_dim), key[i]) && fits;
    fits = put(piece.value(i / piece.head_dim, slot, i % piece.head_dim), value[i]) && fits;
  }
  return fits;
}

// ---- append ----------------------------------------------------------------------------------------------------------

/// Block (kv head, sequence), thread i: RoPE pair i.
template <typename T>
__global__ void append_kernel(const __grid_constant__ ExactTokens exact, int layer, const __grid_constant__ DecodeAppend p) {
  const int head = static_cast<int>(blockIdx.x);
  const int seq = static_cast<int>(blockIdx.y);
  const int i = static_cast<int>(threadIdx.x);
  const int d = exact.head_dim;
  const int half = d / 2;
  const Piece piece(exact, layer, p.place[seq]);
  const int64_t position = p.position[seq];
  const float c = p.cos[int64_t{seq} * half + i];
  const float s = p.sin[int64_t{seq} * half + i];
  for (int h = 0; h < p.n_q; ++h) {
    const T* const q = static_cast<const T*>(p.q) + seq * p.q_stride + (int64_t{head} * p.n_q + h) * d;
    float* const to = p.q_turned + ((int64_t{seq} * exact.n_kv_heads + head) * p.n_q + h) * d;
    const float a = widen(q[i]);
    const float b = widen(q[i + half]);
    to[i] = (a * c - b * s) * p.softmax_scale;
    to[i + half] = (b * c + a * s) * p.softmax_scale;
  }
  const T* const k = static_cast<const T*>(p.k) + seq * p.k_stride + int64_t{head} * d;
  const T* const v = static_cast<const T*>(p.v) + seq * p.v_stride + int64_t{head} * d;
  const float a = widen(k[i]);
  const float b = widen(k[i + half]);
  const float key[2] = {a * c - b * s, b * c + a * s};
  const float value[2] = {widen(v[i]), widen(v[i + half])};
  if (p.k_turned != nullptr) {
    const int64_t at = (int64_t{seq} * exact.n_kv_heads + head) * d + i;
    p.k_turned[at] = key[0], p.k_turned[at + half] = key[1];
    p.v_plain[at] = value[0], p.v_plain[at + half] = value[1];
  }
  if (piece.window_slots > 0) {
    const int slot = piece.window_slot(position);
    bool fits = put(piece.key(head, slot, i), key[0]);
    fits = put(piece.key(head, slot, i + half), key[1]) && fits;
    fits = put(piece.value(head, slot, i), value[0]) && fits;
    fits = put(piece.value(head, slot, i + half), value[1]) && fits;
    if (!fits) *p.refused = 1;
  }
}

/// Block: a sequence; thread: a block of exact slots.
__global__ void exact_masks_kernel(const __grid_constant__ ExactTokens exact, int layer, const __grid_constant__ DecodeAppend p) {
  const int seq = static_cast<int>(blockIdx.x);
  const Piece piece(exact, layer, p.place[seq]);
  const int64_t kv_len = p.position[seq] + 1;
  const int64_t stored = p.stored_len[seq];
  const int64_t oldest = p.first_token[seq];
  for (int block = static_cast<int>(threadIdx.x); block < piece.blocks; block += static_cast<int>(blockDim.x)) {
    unsigned mask = 0;
    for (int t = 0; t < kTokenBlock; ++t) {
      const int slot = block * kTokenBlock + t;
      bool attended;
      if (slot < piece.window_slots) {
        const int64_t position = piece.window_position(slot, kv_len);
        attended = position >= stored && position >= oldest;
      } else {
        const int64_t position = piece.sinks[slot - piece.window_slots];
        attended = position >= oldest && position >= 0 && position < stored;
      }
      mask |= attended ? 1U << t : 0U;
    }
    p.exact_masks[int64_t{seq} * piece.blocks + block] = static_cast<uint16_t>(mask);
  }
}

// ---- window ----------------------------------------------------------------------------------------------------------

/// Block (row, layer of the launch).
__global__ void read_window_kernel(const __grid_constant__ ExactTokens exact, int first_layer, const int32_t* places, const int32_t* positions,
                                   float* key, float* value) {
  const int row = static_cast<int>(blockIdx.x);
  const int layer = static_cast<int>(blockIdx.y);
  const int position = positions[row];
  const Piece piece(exact, first_layer + layer, places[row]);
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
  const Piece piece(exact, layer, place);
  const int64_t row = int64_t{blockIdx.x} * exact.n_kv_heads * exact.head_dim;
  if (!copy_in(piece, piece.window_slot(first + blockIdx.x), key + row, value + row, exact.n_kv_heads)) *refused = 1;
}

// ---- sinks -----------------------------------------------------------------------------------------------------------

/// Brings one layer of one sequence to the wanted sinks; all threads of a block.
/// @param key, value rows of positions first .. first + n - 1
__device__ void assign_sinks(const Piece& piece, const int64_t* entries, int n_entries, int n_first, int64_t first, int64_t n, const float* key,
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
  assign_sinks(Piece(exact, layer, place), entries, n_entries, n_first, first, n, key, value, exact.n_kv_heads, refused);
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
  assign_sinks(Piece(exact, layer, p.place[seq]), positions, n_entries, n_first, position, 1, p.k_turned + seq * channels,
               p.v_plain + seq * channels, exact.n_kv_heads, p.refused);
}

/// Block: a layer.
__global__ void rebuild_masks_kernel(const __grid_constant__ ExactTokens exact, int place) {
  const Piece piece(exact, static_cast<int>(blockIdx.x), place);
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
  const Piece piece(exact, layer, place);
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
  const dim3 blocks(static_cast<unsigned>(exact.n_kv_heads), static_cast<unsigned>(params.batch));
  return with_type(type, [&]<typename T>(T) {
    append_kernel<T><<<blocks, static_cast<unsigned>(exact.head_dim / 2), 0, stream>>>(exact, layer, params);
    return cudaGetLastError();
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
