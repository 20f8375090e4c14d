#pragma once

#include <random>
#include <vector>

#include "kernels/aligned.h"
#include "kv/house/kernels/house_codec_ref.h"
#include "kv/house/kernels/house_load_params.h"

namespace rotunda::kv::house::testing {

/// Pages of any codes and scales in a pool with room between them, some to be unpacked in no order, one of them twice.
struct LoadCase {
  LoadCase(int key_bits, int value_bits, int head_dim, kernels::ElementType of_type)
      : layout{key_bits, value_bits, 2, head_dim, 8}, type(of_type), page_stride(layout.page_bytes() + 64) {
    std::mt19937 random(41);
    pool = rotunda::testing::AlignedBytes(static_cast<size_t>(kPages * page_stride));
    for (size_t i = 0; i < pool.size(); ++i) pool.get()[i] = static_cast<std::byte>(random());
    std::uniform_real_distribution<float> scale(-2.0F, 2.0F);
    for (int page = 0; page < kPages; ++page) {
      for (int head = 0; head < layout.n_kv_heads; ++head) {
        for (int64_t i = 0; i < 2 * layout.page_tokens(); ++i) {
          const Half x = to_half(i == 3 ? 0.0F : scale(random));
          std::memcpy(pool.get() + page * page_stride + layout.key_scale_offset(head) + 2 * i, &x, 2);
        }
      }
    }
    const size_t bytes = layout.n_kv_heads * table.size() * layout.page_tokens() * head_dim * kernels::element_bytes(type);
    key = rotunda::testing::AlignedBytes(bytes, 0xff);
    value = rotunda::testing::AlignedBytes(bytes, 0xff);
  }

  HouseLoadPages params() {
    return {layout, pool.get(), page_stride, table.data(), static_cast<int>(table.size()), type, key.get(), value.get()};
  }

  /// Of the elements that are not as the reference has them.
  int64_t n_wrong() const {
    int64_t wrong = 0, at = 0;
    for (int head = 0; head < layout.n_kv_heads; ++head) {
      for (const int page : table) {
        for (int64_t token = 0; token < layout.page_tokens(); ++token) {
          for (int channel = 0; channel < layout.head_dim; ++channel, ++at) {
            for (const bool is_key : {true, false}) {
              const auto expected = static_cast<float>(element_ref(layout, pool.get() + page * page_stride, is_key, head, token, channel));
              if (element((is_key ? key : value).get(), at) != rounded(expected)) ++wrong;
            }
          }
        }
      }
    }
    return wrong;
  }

  static constexpr int kPages = 4;
  HousePageLayout layout;
  kernels::ElementType type;
  int64_t page_stride;
  std::vector<int32_t> table{2, 0, 2};
  rotunda::testing::AlignedBytes pool, key, value;

 private:
  float rounded(float x) const {
    switch (type) {
      case kernels::ElementType::kBf16: return to_float(to_bfloat16(x));
      case kernels::ElementType::kFp16: return to_float(to_half(x));
      default: return x;
    }
  }
  float element(const std::byte* from, int64_t i) const {
    if (type == kernels::ElementType::kFp32) return reinterpret_cast<const float*>(from)[i];
    const uint16_t bits = reinterpret_cast<const uint16_t*>(from)[i];
    return type == kernels::ElementType::kBf16 ? to_float(BFloat16{bits}) : to_float(Half{bits});
  }
};

/// Calls f(key bits, value bits, head dimension, type) for every kernel, at least once each number of bits of keys and of values.
template <typename F>
void for_each_load_case(const F& f) {
  for (const auto type : {kernels::ElementType::kFp32, kernels::ElementType::kBf16, kernels::ElementType::kFp16}) {
    f(2, 3, 64, type);
    f(3, 4, 80, type);
    f(4, 2, 128, type);
  }
}

}  // namespace rotunda::kv::house::testing
