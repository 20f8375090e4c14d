#pragma once

#include <cuda_runtime.h>

#include "kernels/attention/exact_tokens.h"
#include "kernels/attention/rotate_row.cuh"
#include "kernels/attention/token_block.h"
#include "kernels/cuda/sixteen_bit.cuh"

namespace rotunda::kernels {

/// The exact tokens of one place and layer.
struct ExactPiece {
  __half* keys;
  __half* values;
  int32_t* sinks;   ///< positions by sink slot
  uint16_t* masks;  ///< of pages
  int head_dim;
  int blocks;
  int window_slots;
  int sink_slots;

  __device__ ExactPiece(const ExactTokens& e, int layer, int place)
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

/// Which exact tokens of a sequence are attended. One warp, a lane a slot.
__device__ inline void write_exact_masks(const ExactPiece& piece, const DecodeAppend& p, int seq) {
  const int lane = static_cast<int>(threadIdx.x % kWarp);
  const int64_t kv_len = p.position[seq] + int64_t{1};
  const int64_t stored = p.stored_len[seq];
  const int64_t oldest = p.first_token[seq];
  for (int first = 0; first < piece.blocks; first += kWarp / kTokenBlock) {
    const int slot = first * kTokenBlock + lane;
    bool attended = false;
    if (slot < piece.window_slots) {
      const int64_t position = piece.window_position(slot, kv_len);
      attended = position >= stored && position >= oldest;
    } else if (slot < piece.window_slots + piece.sink_slots) {
      const int64_t position = piece.sinks[slot - piece.window_slots];
      attended = position >= oldest && position >= 0 && position < stored;
    }
    const unsigned all = __ballot_sync(kAllLanes, attended);
    if (lane % kTokenBlock == 0 && slot / kTokenBlock < piece.blocks)
      p.exact_masks[int64_t{seq} * piece.blocks + slot / kTokenBlock] = static_cast<uint16_t>(all >> lane);
  }
}

/// The body of a kernel: block (sequence, kv head), whose warps go round among its query heads, its key and value, and, the first head's,
/// the masks of the sequence. Lane l of a warp holds channels l, l + 32, ... of a row, so both channels of a RoPE pair.
template <typename T, int kHeadDim>
__device__ inline void append_block(const ExactTokens& exact, int layer, const DecodeAppend& p, int warps) {
  constexpr int kElements = kHeadDim / kWarp;
  constexpr int kHalf = kHeadDim / 2;
  const int head = static_cast<int>(blockIdx.x) % exact.n_kv_heads;
  const int seq = static_cast<int>(blockIdx.x) / exact.n_kv_heads;
  const int lane = static_cast<int>(threadIdx.x % kWarp);
  const ExactPiece piece(exact, layer, p.place[seq]);
  const auto read = [&](const void* rows, int64_t stride, int row, float(&x)[kElements]) {
    const T* const from = static_cast<const T*>(rows) + seq * stride + int64_t{row} * kHeadDim;
#pragma unroll
    for (int j = 0; j < kElements; ++j) x[j] = widen(from[kWarp * j + lane]);
  };
  const auto turn = [&](float(&x)[kElements]) {
    const float* const cos = p.cos + int64_t{seq} * kHalf;
    const float* const sin = p.sin + int64_t{seq} * kHalf;
#pragma unroll
    for (int j = 0; j < kElements / 2; ++j) {
      const float c = cos[kWarp * j + lane];
      const float s = sin[kWarp * j + lane];
      const float a = x[j];
      const float b = x[j + kElements / 2];
      x[j] = a * c - b * s;
      x[j + kElements / 2] = b * c + a * s;
    }
  };
  const auto write = [&](float* row, const float(&x)[kElements]) {
#pragma unroll
    for (int j = 0; j < kElements; ++j) row[kWarp * j + lane] = x[j];
  };

  const int tasks = p.n_q + (head == 0 && !p.masks_later ? 2 : 1);
  for (int task = static_cast<int>(threadIdx.x / kWarp); task < tasks; task += warps) {
    if (task < p.n_q) {
      float q[kElements];
      read(p.q, p.q_stride, head * p.n_q + task, q);
      turn(q);
#pragma unroll
      for (float& x : q) x *= p.softmax_scale;
      const int64_t row = ((int64_t{seq} * exact.n_kv_heads + head) * p.n_q + task) * kHeadDim;
      write(p.q_turned + row, q);
      if (p.q_rotated == nullptr) continue;
      rotate_row<kHeadDim>(q);
      write(p.q_rotated + row, q);
    } else if (task == p.n_q) {
      float key[kElements], value[kElements];
      read(p.k, p.k_stride, head, key);
      read(p.v, p.v_stride, head, value);
      turn(key);
      if (p.k_turned != nullptr) {
        const int64_t row = (int64_t{seq} * exact.n_kv_heads + head) * kHeadDim;
        write(p.k_turned + row, key);
        write(p.v_plain + row, value);
      }
      if (piece.window_slots == 0) continue;
      const int slot = piece.window_slot(p.position[seq]);
      bool fits = true;
#pragma unroll
      for (int j = 0; j < kElements; ++j) {
        fits = put(piece.key(head, slot, kWarp * j + lane), key[j]) && fits;
        fits = put(piece.value(head, slot, kWarp * j + lane), value[j]) && fits;
      }
      if (!fits) *p.refused = 1;
    } else {
      write_exact_masks(piece, p, seq);
    }
  }
}

}  // namespace rotunda::kernels
