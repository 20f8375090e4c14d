#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "kernels/attention/decode_attention.h"

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
  float* k_turned = nullptr;  ///< [batch][n_kv_heads][head_dim]; null: not wanted
  float* v_plain = nullptr;
  uint16_t* exact_masks = nullptr;  ///< [batch][window_blocks + sink_blocks] which exact tokens are attended
  int32_t* refused = nullptr;       ///< set to 1 where a key or value is not finite or beyond fp16
};

/// Slots for sinks that a place may have.
inline constexpr int kMostSinkSlots = 128;

/// RoPE of queries and keys, and the new tokens into the window, where there is one.
cudaError_t append_decode_cuda(const ExactTokens& exact, int layer, const DecodeAppend& params, ElementType type, cudaStream_t stream);

/// DecodeAppend::exact_masks, once sinks are what they are to be.
cudaError_t exact_masks_cuda(const ExactTokens& exact, int layer, const DecodeAppend& params, cudaStream_t stream);

/// Tokens of windows as fp32 rows, of several layers.
/// @param place, position [n]; position -1: zeros   @param key, value [n_layers][n][n_kv_heads * head_dim]
cudaError_t read_window_cuda(const ExactTokens& exact, int first_layer, int n_layers, const int32_t* place, const int32_t* position, int n,
                             float* key, float* value, cudaStream_t stream);

/// Rows of one sequence, positions first .. first + n - 1, into its window.
/// @param key, value [n][n_kv_heads * head_dim] fp32, keys after RoPE   @param refused as DecodeAppend
cudaError_t write_window_cuda(const ExactTokens& exact, int layer, int place, int64_t first, int64_t n, const float* key, const float* value,
                              int32_t* refused, cudaStream_t stream);

/// Makes the sinks of one layer of one sequence what they are wanted to be: gives up slots of tokens that are none any more, copies new ones
/// in, and keeps page_masks in step.
/// @param entries [n_entries] positions that are wanted, -1: none   @param n_first so many first tokens are wanted too
/// @param first, n positions of the rows   @param key, value [n][n_kv_heads * head_dim] fp32
cudaError_t update_sinks_cuda(const ExactTokens& exact, int layer, int place, const int64_t* entries, int n_entries, int n_first,
                              int64_t first, int64_t n, const float* key, const float* value, int32_t* refused, cudaStream_t stream);

/// The same for the one new token of each sequence of a decode step, chosen by the layer's input: entries and their magnitudes are the
/// running ones, [places][n_layers][n_entries], largest first; a magnitude of -1: none yet.
/// @param hidden rows of batch tokens, [hidden_size]
cudaError_t update_decode_sinks_cuda(const ExactTokens& exact, int layer, const DecodeAppend& params, ElementType type, const void* hidden,
                                     int hidden_size, int64_t hidden_stride, float* magnitudes, int64_t* entries, int n_entries, int n_first,
                                     cudaStream_t stream);

/// page_masks of one sequence anew, all layers, from sink_positions.
cudaError_t rebuild_masks_cuda(const ExactTokens& exact, int place, cudaStream_t stream);

/// Puts the exact tokens of one layer of one sequence over what its pages gave: sinks, and window tokens window_first .. limit - 1.
/// @param key, value [n_kv_heads][rows][head_dim] of positions 0 .. rows - 1   @param limit no position from here on; at most `rows`
cudaError_t overlay_exact_cuda(const ExactTokens& exact, int layer, int place, int64_t window_first, int64_t limit, void* key, void* value,
                               int64_t rows, ElementType type, cudaStream_t stream);

}  // namespace rotunda::kernels
