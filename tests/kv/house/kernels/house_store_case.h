#pragma once

#include <cstring>
#include <random>
#include <vector>

#include "kernels/aligned.h"
#include "kv/house/kernels/house_codec_ref.h"
#include "kv/house/kernels/house_store_params.h"

namespace rotunda::kv::house::testing {

/// Tokens of two layers for the pages of a small pool that holds something already, and the pool as house_store_ref leaves it.
struct StoreCase {
  using AlignedBytes = rotunda::testing::AlignedBytes;

  StoreCase(int key_bits, int value_bits, int head_dim, bool with_feedback, ScaleRule scale, uint32_t seed) : random(seed) {
    layer.layout = {key_bits, value_bits, 2, head_dim, 8};
    layer.scale = scale;
    layer_bytes = layer.layout.page_bytes() + 64;
    pool = AlignedBytes(static_cast<size_t>(kPages * kLayers * layer_bytes));
    for (size_t i = 0; i < pool.size(); ++i) pool.get()[i] = static_cast<std::byte>(random());
    // Whole pairs, one that crosses from block to block, none, a single token, the last of a page; rows in no order.
    pairs = {{1, 0, 0, 0xffffffffU}, {0, 3, 32, 0xffffffffU}, {1, 2, 67, 0x00ffff00U},
             {-1, 0, -1, 0},         {0, 1, 64, 0x00000008U}, {2, 3, 65, 0xc0000000U}};
    row_stride = int64_t{2} * head_dim + 8;
    std::normal_distribution<float> normal;
    for (auto* rows : {&key, &value}) {
      rows->resize(static_cast<size_t>(kLayers * kRows) * row_stride);
      for (float& x : *rows) x = normal(random);
    }
    const auto fill = [&](int row, float x) { std::fill_n(key.begin() + row * row_stride, 2 * head_dim, x); };
    fill(3, 0.0F);
    fill(5, 1e-25F);   // its mean square is 0
    fill(7, 2e-20F);   // subnormal squares
    fill(9, 1000.0F);  // every code the same
    for (int c = 0; c < head_dim; ++c) key[11 * row_stride + c] = c == 5 ? 3e4F : 1e-3F;
    if (with_feedback) {
      const int64_t heads = 2 * kLayers;
      feedback = AlignedBytes(static_cast<size_t>(heads) * head_dim * head_dim * 4);
      for (int64_t i = 0; i < heads * head_dim * head_dim; ++i) feedback.floats()[i] = 0.1F * normal(random);
      for (int64_t head = 0; head < heads; ++head)
        for (int64_t c = 0; c < head_dim; ++c)
          feedback.floats()[(head * head_dim + c) * head_dim + c] = 0.5F + std::abs(normal(random) * normal(random));
    }
  }

  HouseStoreBatch params() {
    HouseStoreBatch p;
    p.layout = layer.layout;
    p.scale = layer.scale;
    if (feedback.size() > 0) p.feedback = feedback.floats();
    p.key = key.data();
    p.value = value.data();
    p.row_stride = row_stride;
    p.layer_stride = kRows * row_stride;
    p.pool = pool.get();
    p.page_bytes = kLayers * layer_bytes;
    p.layer_bytes = layer_bytes;
    p.pairs = pairs.data();
    p.n_pairs = static_cast<int>(pairs.size());
    p.n_rows = few ? p.n_pairs : 32 * p.n_pairs;
    p.n_layers = kLayers;
    p.refused = refused.data();
    return p;
  }

  /// The pool after the same tokens by the reference. @return whether all were taken
  bool expected(AlignedBytes& result) const {
    result = AlignedBytes(pool.size());
    std::memcpy(result.get(), pool.get(), pool.size());
    bool taken = true;
    for (int l = 0; l < kLayers; ++l) {
      HouseLayer of_layer = layer;
      if (feedback.size() > 0) of_layer.feedback = feedback.floats() + int64_t{l} * 2 * layer.layout.head_dim * layer.layout.head_dim;
      for (const StorePair& pair : pairs) taken = store_ref(of_layer, l, pair, result) && taken;
    }
    return taken;
  }

  static constexpr int kLayers = 2;
  static constexpr int kPages = 3;
  static constexpr int kRows = 84;
  std::mt19937 random;
  bool few = false;  ///< to be packed by the kernel for few tokens a pair
  HouseLayer layer;
  AlignedBytes pool, feedback;
  std::vector<StorePair> pairs;
  std::vector<float> key, value;
  int64_t row_stride = 0;
  int64_t layer_bytes = 0;
  std::vector<int32_t> refused = std::vector<int32_t>(kLayers);

 private:
  bool store_ref(const HouseLayer& of_layer, int l, const StorePair& pair, AlignedBytes& result) const {
    bool taken = true;
    int row = l * kRows + pair.row;
    for (int t = 0; t < 32; ++t) {
      if ((pair.tokens >> t & 1U) == 0) continue;
      HouseStoreParams p{};
      p.layer = &of_layer;
      p.key = key.data() + row * row_stride;
      p.value = value.data() + row * row_stride;
      p.row_stride = row_stride;
      p.block = 2 * pair.pair + t / 16;
      p.first = t % 16;
      p.n_tokens = 1;
      p.page = result.get() + (int64_t{pair.page} * kLayers + l) * layer_bytes;
      taken = house_store_ref(p) && taken;
      ++row;
    }
    return taken;
  }
};

}  // namespace rotunda::kv::house::testing
