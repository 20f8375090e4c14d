#pragma once

#include "kv/rotate/kernels/rotate_load_params.h"
#include "kv/rotate/kernels/rotate_store_case.h"

namespace rotunda::kv::rotate::testing {

/// Pages of any codes with scales that trained models have, read in another order than they lie.
struct LoadCase {
  using AlignedBytes = rotunda::testing::AlignedBytes;

  LoadCase(const RotatePageLayout& of_pages, kernels::ElementType type, uint32_t seed) : random(seed), layout(of_pages), value_type(type) {
    const std::vector<uint16_t> order = random_order(layout.kv_channels(), random);
    key_group.resize(order.size());
    for (size_t i = 0; i < order.size(); ++i) key_group[order[i]] = static_cast<uint16_t>(i / layout.group_size);
    pool = AlignedBytes(static_cast<size_t>(kPages * layout.page_bytes()));
    for (size_t i = 0; i < pool.size(); ++i) pool.get()[i] = static_cast<std::byte>(random());
    for (int page = 0; page < kPages; ++page) fill_scales(layout, pool.get() + page * layout.page_bytes(), random);
    key.assign(static_cast<size_t>(n_tokens()) * layout.kv_channels(), std::numeric_limits<float>::quiet_NaN());
    value = AlignedBytes(key.size() * value_size(), 0xff);
  }

  /// Scales, and minima, as a cache of normal numbers has them.
  static void fill_scales(const RotatePageLayout& l, std::byte* page, std::mt19937& random) {
    std::uniform_real_distribution<float> scale(0.2F, 1.0F);
    const auto fill = [&](int64_t at, float factor) {
      for (int64_t i = 0; i < l.scale_bytes() / 2; ++i) {
        const Half x = to_half(factor * scale(random));
        std::memcpy(page + at + 2 * i, &x, 2);
      }
    };
    fill(l.key_scale_offset(), 1.0F);
    fill(l.value_scale_offset(), 1.0F);
    if (l.zero == ZeroPoint::kMinimum) {
      fill(l.key_zero_offset(), -2.0F);
      fill(l.value_zero_offset(), -2.0F);
      return;
    }
    for (const int64_t at : {l.key_zero_offset(), l.value_zero_offset()})
      for (int64_t i = 0; i < l.zeros_bytes(); ++i) page[at + i] = static_cast<std::byte>(static_cast<int>(random() % 12) - 4);
  }

  RotateLoadBatch params() {
    return {layout, key_group.data(), pool.get(), layout.page_bytes(), table.data(), static_cast<int>(table.size()),
            key.data(), value.get(), value_type};
  }
  int64_t n_tokens() const { return static_cast<int64_t>(table.size()) * layout.page_tokens(); }
  size_t value_size() const { return value_type == kernels::ElementType::kFp32 ? 4 : 2; }

  float value_at(int64_t i) const {
    if (value_type == kernels::ElementType::kFp32) return value.floats()[i];
    uint16_t bits;
    std::memcpy(&bits, value.get() + 2 * i, 2);
    return value_type == kernels::ElementType::kBf16 ? to_float(BFloat16{bits}) : to_float(Half{bits});
  }
  float rounded(double x) const {
    const auto single = static_cast<float>(x);
    if (value_type == kernels::ElementType::kFp32) return single;
    return value_type == kernels::ElementType::kBf16 ? to_float(to_bfloat16(single)) : to_float(to_half(single));
  }

  /// Elements that are not those of the reference. A product of an fp16 scale and a small integer is exact in fp32; with a minimum it is
  /// one rounding.
  int64_t wrong() const {
    int64_t n = 0;
    const int channels = layout.group_channels();
    for (int64_t token = 0; token < n_tokens(); ++token) {
      const std::byte* const page = pool.get() + table[token / layout.page_tokens()] * layout.page_bytes();
      const int64_t of_page = token % layout.page_tokens();
      for (int c = 0; c < layout.kv_channels(); ++c) {
        const double k = dequantize_ref(layout, page, true, key_group[c], of_page,
                                        read_code(page, key_place(layout, c / channels, of_page, c % channels)));
        n += key[token * layout.kv_channels() + c] == static_cast<float>(k) ? 0 : 1;
        const int head = c / layout.head_dim;
        const double v = dequantize_ref(layout, page, false, c / layout.group_size, of_page,
                                        read_code(page, value_place(layout, head, of_page, c % layout.head_dim)));
        n += value_at((head * n_tokens() + token) * layout.head_dim + c % layout.head_dim) == rounded(v) ? 0 : 1;
      }
    }
    return n;
  }

  static constexpr int kPages = 3;
  std::mt19937 random;
  RotatePageLayout layout;
  kernels::ElementType value_type;
  std::vector<uint16_t> key_group;
  AlignedBytes pool;
  std::vector<int32_t> table = {2, 0};
  std::vector<float> key;
  AlignedBytes value;
};

}  // namespace rotunda::kv::rotate::testing
