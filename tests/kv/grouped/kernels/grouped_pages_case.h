#pragma once

#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "kernels/aligned.h"
#include "kv/grouped/kernels/grouped_pages_params.h"
#include "kv/grouped/kernels/grouped_ways.h"

namespace rotunda::kv::grouped::testing {

using rotunda::testing::AlignedBytes;

/// Tokens of two layers for the pages of a small pool that holds something already, and what the CPU makes of them.
struct StoreCase {
  explicit StoreCase(const GroupedLayer& of_layer) : layer(of_layer), layer_bytes(of_layer.layout.page_bytes() + 64) {
    std::mt19937 random(7);
    pool = AlignedBytes(static_cast<size_t>(kPages * kLayers * layer_bytes));
    for (size_t i = 0; i < pool.size(); ++i) pool.get()[i] = static_cast<std::byte>(random());
    // A whole pair, one that crosses from block to block, none, a single odd token, the last of a page; rows in no order.
    pairs = {{1, 0, 0, 0xffffffffU}, {0, 2, 35, 0x003fff80U}, {-1, 0, -1, 0}, {0, 1, 32, 0x00000008U}, {1, 3, 33, 0xc0000000U}};
    channels = int64_t{layer.layout.n_kv_heads} * layer.layout.head_dim;
    row_stride = channels + 8;
    key = random_rows(kLayers * kRows * row_stride, 8);
    value = random_rows(kLayers * kRows * row_stride, 9, 0.1F);
    const auto scale = [&](int row, float by) {
      for (int64_t c = 0; c < channels; ++c) key[row * row_stride + c] *= by;
    };
    scale(3, 0.0F);
    scale(5, 1e-40F);
    scale(7, 1e-20F);
    scale(9, 1e-4F);
    scale(11, 40.0F);
    key[13 * row_stride + 5] = 300.0F;  // one outlier
    for (int64_t c = 0; c < channels; ++c) {
      key[15 * row_stride + c] = -0.75F;
      key[17 * row_stride + c] = 0.5F * static_cast<float>(c % 17 - 8);  // ties
    }
  }

  GroupedStoreBatch params() {
    GroupedStoreBatch p;
    p.layer = layer;
    p.key = key.data();
    p.value = value.data();
    p.row_stride = row_stride;
    p.layer_stride = kRows * row_stride;
    p.pool = pool.get();
    p.page_bytes = kLayers * layer_bytes;
    p.layer_bytes = layer_bytes;
    p.pairs = pairs.data();
    p.n_pairs = static_cast<int>(pairs.size());
    p.n_layers = kLayers;
    p.refused = refused.data();
    return p;
  }

  /// The pool after the same tokens by grouped_store, token by token. @param taken whether all were
  AlignedBytes expected(bool* taken) const {
    AlignedBytes result(pool.size());
    std::memcpy(result.get(), pool.get(), pool.size());
    *taken = true;
    for (int64_t l = 0; l < kLayers; ++l) {
      for (const StorePair& pair : pairs) {
        int64_t row = (l * kRows + pair.row) * row_stride;
        for (int t = 0; t < 32; ++t) {
          if ((pair.tokens >> t & 1U) == 0) continue;
          std::byte* const page = result.get() + (int64_t{pair.page} * kLayers + l) * layer_bytes;
          *taken = grouped_store({&layer, key.data() + row, value.data() + row, row_stride, 2 * pair.pair + t / 16, t % 16, 1, page}) && *taken;
          row += row_stride;
        }
      }
    }
    return result;
  }

  static constexpr int kLayers = 2;
  static constexpr int kPages = 2;
  static constexpr int kRows = 51;
  GroupedLayer layer;
  int64_t layer_bytes;
  AlignedBytes pool;
  std::vector<StorePair> pairs;
  std::vector<float> key, value;
  int64_t channels = 0;
  int64_t row_stride = 0;
  std::vector<int32_t> refused = std::vector<int32_t>(kLayers);
};

/// Two pages of one sequence in a pool of three, and what grouped_load makes of them.
struct LoadCase {
  LoadCase(const GroupedLayer& of_layer, kernels::ElementType of_type)
      : layer(of_layer), type(of_type), page_stride(of_layer.layout.page_bytes() + 64) {
    pool = AlignedBytes(static_cast<size_t>(3 * page_stride));
    const GroupedPageLayout& l = layer.layout;
    const int64_t channels = int64_t{l.n_kv_heads} * l.head_dim;
    for (const int32_t page : table) {
      for (int block = 0; block < l.blocks_per_page; ++block) {
        const std::vector<float> rows = random_rows(2 * 16 * channels, static_cast<unsigned>(100 * page + block), block == 1 ? 1e-30F : 1.0F);
        EXPECT_TRUE(grouped_store({&layer, rows.data(), rows.data() + 16 * channels, channels, block, 0, 16, pool.get() + page * page_stride}));
      }
    }
    const int64_t elements = 2 * l.page_tokens() * channels;
    const size_t bytes = static_cast<size_t>(elements) * (type == kernels::ElementType::kFp32 ? 4 : 2);
    key = AlignedBytes(bytes, 0xff);
    value = AlignedBytes(bytes, 0xff);
  }

  GroupedLoadPages params() {
    return {layer, pool.get(), page_stride, table.data(), static_cast<int>(table.size()), type, key.get(), value.get()};
  }

  /// Elements that are not what they should be.
  int64_t n_wrong() const {
    const GroupedPageLayout& l = layer.layout;
    const int64_t d = l.head_dim;
    AlignedBytes keys(static_cast<size_t>(d) * 64), values(static_cast<size_t>(d) * 64);
    int64_t wrong = 0;
    for (int64_t page = 0; page < 2; ++page) {
      for (int head = 0; head < l.n_kv_heads; ++head) {
        for (int block = 0; block < l.blocks_per_page; ++block) {
          grouped_load({&layer, pool.get() + table[page] * page_stride, head, block, keys.floats(), values.floats()});
          for (int64_t t = 0; t < 16; ++t) {
            const int64_t row = ((head * 2 + page) * l.page_tokens() + block * 16 + t) * d;
            for (int64_t c = 0; c < d; ++c) {
              wrong += equals(key, row + c, keys.floats()[c * 16 + t]) ? 0 : 1;
              wrong += equals(value, row + c, values.floats()[t * d + c]) ? 0 : 1;
            }
          }
        }
      }
    }
    return wrong;
  }

  GroupedLayer layer;
  kernels::ElementType type;
  int64_t page_stride;
  AlignedBytes pool, key, value;
  std::vector<int32_t> table = {2, 0};

 private:
  // As numbers: fp6 and fp4 have a negative zero, which the CPU's integers lose.
  bool equals(const AlignedBytes& got, int64_t i, float expected) const {
    if (type == kernels::ElementType::kFp32) return got.floats()[i] == expected;
    uint16_t bits = 0;
    std::memcpy(&bits, got.get() + 2 * i, 2);
    if (type == kernels::ElementType::kBf16) return to_float(BFloat16{bits}) == to_float(to_bfloat16(expected));
    return to_float(Half{bits}) == to_float(to_half(expected));
  }
};

}  // namespace rotunda::kv::grouped::testing
