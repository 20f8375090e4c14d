#pragma once

#include <algorithm>
#include <cstring>
#include <numeric>
#include <random>
#include <vector>

#include "kernels/aligned.h"
#include "kv/rotate/kernels/rotate_codec_ref.h"
#include "kv/rotate/kernels/rotate_store_params.h"

namespace rotunda::kv::rotate::testing {

/// Layouts of all bits and zero points: heads of trained models, groups across heads, an odd number of runs, one head alone.
/// @param every take each every-th layout only
template <typename Body>
void for_each_layout(const Body& body, int every = 1) {
  struct Shape {
    int n_kv_heads, head_dim, heads_per_group, group_size;
  };
  int index = 0;
  for (const int bits : {2, 3, 4}) {
    for (const ZeroPoint zero : {ZeroPoint::kCode, ZeroPoint::kMinimum}) {
      for (const Shape& s : {Shape{8, 128, 4, 128}, Shape{4, 80, 4, 64}, Shape{3, 48, 1, 144}, Shape{1, 16, 1, 16}}) {
        if (index++ % every == 0) body(RotatePageLayout{bits, zero, s.n_kv_heads, s.head_dim, s.heads_per_group, s.group_size, 8});
      }
    }
  }
}

/// A calibrated order of channels, any.
inline std::vector<uint16_t> random_order(int channels, std::mt19937& random) {
  std::vector<uint16_t> order(channels);
  std::iota(order.begin(), order.end(), uint16_t{0});
  std::shuffle(order.begin(), order.end(), random);
  return order;
}

/// Tokens of two layers for the pages of a small pool that holds something already, and the pool as rotate_store_ref leaves it.
struct StoreCase {
  using AlignedBytes = rotunda::testing::AlignedBytes;

  StoreCase(const RotatePageLayout& of_pages, uint32_t seed) : random(seed), layout(of_pages) {
    const int channels = layout.kv_channels();
    pool = AlignedBytes(static_cast<size_t>(kPages * page_stride()));
    for (size_t i = 0; i < pool.size(); ++i) pool.get()[i] = static_cast<std::byte>(random());
    // Whole pairs, one that crosses from block to block, a single token, the last of a page; rows in no order.
    pairs = {{1, 0, 0, 0xffffffffU}, {0, 3, 32, 0xffffffffU}, {1, 2, 67, 0x00ffff00U}, {0, 1, 64, 0x00000008U}, {2, 3, 65, 0xc0000000U}};
    for (int layer = 0; layer < kLayers; ++layer) {
      const std::vector<uint16_t> order = random_order(channels, random);
      key_order.insert(key_order.end(), order.begin(), order.end());
      key_group.resize(key_order.size());
      for (int i = 0; i < channels; ++i) key_group[layer * channels + order[i]] = static_cast<uint16_t>(i / layout.group_size);
    }
    std::normal_distribution<float> normal;
    for (auto* rows : {&key, &value}) {
      rows->resize(static_cast<size_t>(kLayers * layer_stride()));
      for (float& x : *rows) x = 2.0F * normal(random) + 0.3F;
      const auto row = [&](int i, const auto& element) {
        for (int c = 0; c < channels; ++c) (*rows)[i * row_stride() + c] = element(c * 7919 % 1009);
      };
      row(0, [](int) { return 0.0F; });  // constant groups
      row(1, [](int) { return -2.5F; });
      row(2, [](int) { return 65504.0F; });
      row(3, [](int) { return 1e-40F; });
      row(4, [](int i) { return i == 5 ? 6e4F : 0.01F * static_cast<float>(i % 13); });    // one outlier
      row(5, [](int i) { return 100.0F + 0.001F * static_cast<float>(i % 5); });           // the zero point would not fit
      row(6, [](int i) { return -100.0F - 0.001F * static_cast<float>(i % 5); });
      row(7, [](int i) { return 1.0F + 1e-7F * static_cast<float>(i % 3); });              // scale below fp16
      row(8, [](int i) { return 1e-6F * static_cast<float>(100 + i % 7); });               // subnormal scales
      row(9, [](int i) { return -1e-40F * static_cast<float>(1 + i % 9); });               // subnormal even in fp32
      row(10, [](int i) { return 0.5F * static_cast<float>(i % 7) - 1.5F; });              // exact ties and codes
    }
  }

  int64_t row_stride() const { return layout.kv_channels() + 8; }
  int64_t layer_stride() const { return kRows * row_stride(); }
  int64_t page_stride() const { return kLayers * layout.page_bytes() + 32; }

  RotateStoreBatch params() {
    return {layout,         kLayers,        key_group.data(), key_order.data(), key_clip,      value_clip,   key.data(),
            value.data(),   row_stride(),   layer_stride(),   pool.get(),       page_stride(), layout.page_bytes(),
            pairs.data(),   static_cast<int>(pairs.size()),   refused.data()};
  }

  /// The pool after the same tokens by the reference, and for each layer whether all were taken.
  std::vector<bool> expected(AlignedBytes& result) const {
    result = AlignedBytes(pool.size());
    std::memcpy(result.get(), pool.get(), pool.size());
    std::vector<bool> taken(kLayers, true);
    for (int index = 0; index < kLayers; ++index) {
      RotateLayer layer{};
      layer.layout = layout;
      layer.key_group = key_group.data() + int64_t{index} * layout.kv_channels();
      layer.key_clip = key_clip;
      layer.value_clip = value_clip;
      for (const StorePair& pair : pairs) {
        int row = pair.row;
        for (int t = 0; t < 32; ++t) {
          if ((pair.tokens >> t & 1U) == 0) continue;
          const int64_t at = index * layer_stride() + row * row_stride();
          taken[index] = rotate_store_ref({&layer, key.data() + at, value.data() + at, row_stride(), 2 * pair.pair + t / 16, t % 16, 1,
                                           result.get() + pair.page * page_stride() + index * layout.page_bytes()}) &&
                         taken[index];
          ++row;
        }
      }
    }
    return taken;
  }

  static constexpr int kPages = 3;
  static constexpr int kLayers = 2;
  static constexpr int64_t kRows = 84;
  std::mt19937 random;
  RotatePageLayout layout;
  float key_clip = 0.8F;
  float value_clip = 1.0F;
  AlignedBytes pool;
  std::vector<StorePair> pairs;
  std::vector<uint16_t> key_group, key_order;
  std::vector<float> key, value;
  std::vector<int32_t> refused = std::vector<int32_t>(kLayers);
};

/// Elements that no cache takes, or not at every number of bits.
inline constexpr float kBad[] = {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity(), 3e38F, -2e6F, 1e5F};

}  // namespace rotunda::kv::rotate::testing
