#pragma once

#include <cstddef>
#include <cstdint>

namespace rotunda::kernels {

/// Tokens that sequences keep in 16 bits (fp16) beside packed pages, on a GPU: of every sequence and layer a piece of memory as in
/// PlainPageLayout with window_blocks + sink_blocks blocks. Position p of the window lies in slot p % (16 window_blocks); sinks lie in the
/// slots after those of the window, anywhere. A sequence owns a `place`, the same for all layers.
struct ExactTokens {
  std::byte* bytes = nullptr;  ///< of place 0, layer 0
  int64_t place_stride = 0;    ///< bytes
  int64_t layer_stride = 0;    ///< bytes
  int n_layers = 0;
  int n_kv_heads = 0;
  int head_dim = 0;
  int window_blocks = 0;
  int sink_blocks = 0;
  int32_t* sink_positions = nullptr;  ///< [places][n_layers][16 sink_blocks]; -1: a free slot
  /// [n_layers][places][mask_stride]: bit t of entry b is set where token 16 b + t, which is in pages, is no sink
  uint16_t* page_masks = nullptr;
  int64_t mask_stride = 0;  ///< entries
  int64_t n_places = 0;
};

/// What the new tokens of a decode step bring to one layer, one token per sequence.
struct DecodeAppend {
  int batch = 0;
  int n_q = 0;               ///< query heads per kv head
  float softmax_scale = 0;
  const int32_t* place = nullptr;       ///< [batch]
  const int32_t* position = nullptr;    ///< [batch] of the new token
  const int32_t* stored_len = nullptr;  ///< [batch] tokens in pages after this step
  const int32_t* first_token = nullptr;  ///< [batch] older tokens are not attended
  const int32_t* choose = nullptr;       ///< [batch] not 0: the token may become a sink by the layer's input
  const float* cos = nullptr;  ///< [batch][head_dim / 2], attention factor in
  const float* sin = nullptr;
  const void* q = nullptr;  ///< rows of batch tokens: [n_kv_heads * n_q][head_dim] before RoPE
  const void* k = nullptr;  ///< [n_kv_heads][head_dim]
  const void* v = nullptr;
  int64_t q_stride = 0;  ///< elements between rows
  int64_t k_stride = 0;
  int64_t v_stride = 0;
  float* q_turned = nullptr;  ///< [batch][n_kv_heads * n_q][head_dim] after RoPE, times softmax scale
  float* q_rotated = nullptr;  ///< the same times the normalized Hadamard matrix; null: not wanted
  float* k_turned = nullptr;  ///< [batch][n_kv_heads][head_dim]; null: not wanted
  float* v_plain = nullptr;
  uint16_t* exact_masks = nullptr;  ///< [batch][window_blocks + sink_blocks] which exact tokens are attended
  bool masks_later = false;         ///< sinks change between append_decode_cuda, which leaves masks alone then, and exact_masks_cuda
  int32_t* refused = nullptr;       ///< set to 1 where a key or value is not finite or beyond fp16
};

/// Slots for sinks that a place may have.
inline constexpr int kMostSinkSlots = 128;

}  // namespace rotunda::kernels
