#include "kv/stored_attention.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>

#include "kernels/attention/token_block.h"

namespace rotunda::kv {

namespace {

using kernels::kTokenBlock;

// [n_queries, N] -> [rep * n_queries, N], or undefined where every query sees every token.
// @param oldest, newest of `positions`
at::Tensor visibility_mask(const at::Tensor& positions, int64_t oldest, int64_t newest, int64_t first_query, int64_t n_queries, int64_t rep,
                           Visibility visibility) {
  const bool all_old_enough = newest <= first_query - visibility.lag;
  const bool all_in_window = visibility.window == 0 || oldest > first_query + n_queries - 1 - visibility.window;
  if (all_old_enough && all_in_window) return {};
  const at::Tensor queries = at::arange(first_query, first_query + n_queries, positions.options());
  const at::Tensor distance = queries.unsqueeze(1) - positions.unsqueeze(0);
  at::Tensor mask = distance.ge(visibility.lag);
  if (visibility.window != 0) mask.logical_and_(distance.lt(visibility.window));
  return rep == 1 ? mask : mask.repeat({rep, 1});
}

}  // namespace

at::Tensor visibility_mask(int64_t begin, int64_t n, int64_t first_query, int64_t n_queries, int64_t rep, Visibility visibility,
                           at::Device device) {
  const at::Tensor positions = at::arange(begin, begin + n, at::TensorOptions().dtype(at::kLong).device(device));
  return visibility_mask(positions, begin, begin + n - 1, first_query, n_queries, rep, visibility);
}

void add_stored(ops::TileAttention& attention, const StoredTokens& tokens, int64_t begin, int64_t end,
                const std::vector<int64_t>& excluded, int64_t first_query, int64_t n_queries, int64_t rep, Visibility visibility) {
  const int64_t last_query = first_query + n_queries - 1;
  end = std::min(end, last_query - visibility.lag + 1);
  if (visibility.window != 0) begin = std::max(begin, first_query - visibility.window + 1);
  begin = std::max<int64_t>(0, begin) / kTokenBlock * kTokenBlock;
  const int64_t channels = tokens.n_kv_heads * tokens.head_dim;
  for (int64_t tile = begin; tile < end; tile += kTileTokens) {
    const int64_t tile_end = std::min(tile + kTileTokens, end);
    const int64_t n_blocks = (tile_end - tile + kTokenBlock - 1) / kTokenBlock;
    const int64_t stride = n_blocks * kTokenBlock;
    const at::Tensor key = at::empty({tokens.n_kv_heads, tokens.head_dim, stride}, at::kFloat);
    const at::Tensor value = at::empty({tokens.n_kv_heads, stride, tokens.head_dim}, at::kFloat);
    float* key_data = key.data_ptr<float>();
    float* value_data = value.data_ptr<float>();
    const int64_t grain = std::max<int64_t>(1, (int64_t{1} << 14) / (channels * kTokenBlock));
    at::parallel_for(0, n_blocks, grain, [&](int64_t block_begin, int64_t block_end) {
      for (int64_t block = block_begin; block < block_end; ++block)
        tokens.load_block(tile / kTokenBlock + block, key_data + block * kTokenBlock, stride,
                          value_data + block * kTokenBlock * tokens.head_dim, stride * tokens.head_dim);
    });
    at::Tensor mask = visibility_mask(tile, tile_end - tile, first_query, n_queries, rep, visibility, at::kCPU);
    const auto low = std::lower_bound(excluded.begin(), excluded.end(), tile);
    const auto high = std::lower_bound(low, excluded.end(), tile_end);
    if (low != high) {
      if (!mask.defined()) mask = at::ones({1, tile_end - tile}, at::kBool);
      for (auto it = low; it != high; ++it) mask.select(1, *it - tile).fill_(false);
    }
    attention.add(key.narrow(2, 0, tile_end - tile), value.narrow(1, 0, tile_end - tile), mask);
  }
}

void add_exact(ops::TileAttention& attention, const at::Tensor& k_t, const at::Tensor& v, const at::Tensor& positions,
               int64_t first_query, int64_t n_queries, int64_t rep, Visibility visibility) {
  if (positions.numel() == 0) return;
  attention.add(k_t, v, visibility_mask(positions, positions.min().item<int64_t>(), positions.max().item<int64_t>(), first_query, n_queries, rep,
                                        visibility));
}

}  // namespace rotunda::kv
