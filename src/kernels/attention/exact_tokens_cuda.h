#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "kernels/attention/decode_attention.h"
#include "kernels/attention/exact_tokens.h"

namespace rotunda::kernels {

/// RoPE of queries and keys, the new tokens into the window, where there is one, and exact_masks.
/// @return cudaErrorInvalidValue unless head_dim is 64, 128 or 256
cudaError_t append_decode_cuda(const ExactTokens& exact, int layer, const DecodeAppend& params, ElementType type, cudaStream_t stream);

/// DecodeAppend::exact_masks of `masks_later`, once sinks are what they are to be.
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
