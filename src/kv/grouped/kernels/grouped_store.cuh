#pragma once

#include <cuda_runtime.h>

#include "kv/grouped/kernels/grouped_pages_params.h"
#include "kv/grouped/kernels/grouped_place.h"
#include "kv/grouped/kernels/grouped_quantize.h"

namespace rotunda::kv::grouped {

/// Packs the keys, or the values, of one kv head and one pair of blocks. A thread quantizes one group of one token by the CPU's own
/// function; codes meet in shared memory, where words are put together: no word of a page holds tokens of two pairs, and within the pair
/// each word has one thread that writes it.
class GroupedStoreBlock {
 public:
  static constexpr int kPairTokens = 2 * kTokenBlock;
  static constexpr int kMaxThreads = 128;
  /// Of a block: as many as find work while groups are quantized, which takes longest.
  static constexpr int threads(const GroupedPageLayout& l) {
    const int groups = std::max(l.groups(l.key), l.groups(l.value));
    return groups < kMaxThreads / kPairTokens ? groups * kPairTokens : kMaxThreads;
  }

  /// Of a token in shared memory: its codes and zero points. An odd number of words, so that tokens lie in different banks.
  static constexpr int row_bytes(int head_dim) { return ((head_dim + head_dim / 16 + 3) / 4 | 1) * 4; }
  static constexpr int shared_bytes(int head_dim) { return kPairTokens * (row_bytes(head_dim) + 1); }

  /// Thread blocks of a launch.
  static constexpr int64_t blocks(const GroupedStoreBatch& p) { return int64_t{p.n_layers} * p.layer.layout.n_kv_heads * 2 * p.n_pairs; }

  static __device__ void run(const GroupedStoreBatch& p, std::byte* shared) {
    // blockIdx.x = ((layer * n_kv_heads + head) * 2 + (0: keys, 1: values)) * n_pairs + pair
    const StorePair pair = p.pairs[blockIdx.x % static_cast<unsigned>(p.n_pairs)];
    if (pair.tokens == 0) return;
    const unsigned rest = blockIdx.x / static_cast<unsigned>(p.n_pairs);
    const auto n_kv_heads = static_cast<unsigned>(p.layer.layout.n_kv_heads);
    const int first = __ffs(static_cast<int>(pair.tokens)) - 1;
    GroupedStoreBlock(p, pair, first, __popc(pair.tokens), static_cast<int>(rest / 2 / n_kv_heads), static_cast<int>(rest / 2 % n_kv_heads),
                      rest % 2 == 0, shared)
        .store();
  }

 private:
  __device__ GroupedStoreBlock(const GroupedStoreBatch& p, const StorePair& pair, int first, int n_tokens, int layer, int head, bool is_key,
                               std::byte* shared)
      : p_(p),
        l_(p.layer.layout),
        side_(is_key ? l_.key : l_.value),
        pair_(pair),
        layer_(layer),
        head_(head),
        is_key_(is_key),
        page_(p.pool + pair.page * p.page_bytes + layer * p.layer_bytes),
        first_(first),
        n_tokens_(n_tokens),
        threads_(threads(l_)),
        codes_(reinterpret_cast<uint8_t*>(shared)),
        kept_(codes_ + kPairTokens * row_bytes(l_.head_dim)) {}

  __device__ void store() const {
    const int thread = static_cast<int>(threadIdx.x);
    if (thread < kPairTokens) kept_[thread] = (pair_.tokens >> thread & 1U) != 0 ? 1 : 0;
    __syncthreads();
    for (int i = thread; i < n_tokens_ * l_.groups(side_); i += threads_) quantize(i % n_tokens_, i / n_tokens_);
    __syncthreads();
    for (int width = kWidestPlane; width > 0; width /= 2) {
      if (!has_plane(side_.bits, width)) continue;
      if (is_key_) write_keys(width);
      else write_values(width);
      if (side_.zeros) write_zeros(width);
    }
  }

  __device__ uint8_t* row(int token) const { return codes_ + token * row_bytes(l_.head_dim); }
  /// A token's place within the page.
  __device__ int64_t place(int token) const { return int64_t{kPairTokens} * pair_.pair + token; }
  __device__ uint32_t& word(int64_t at) const { return *reinterpret_cast<uint32_t*>(page_ + at); }

  /// @param i of the tokens that are stored
  __device__ void quantize(int i, int group) const {
    const int token = first_ + i;
    const float* const x = (is_key_ ? p_.key : p_.value) + layer_ * p_.layer_stride + (int64_t{pair_.row} + i) * p_.row_stride +
                           int64_t{head_} * l_.head_dim + group * side_.group;
    const auto scale = quantize_group(side_, is_key_ ? p_.layer.key : p_.layer.value, x, row(token) + group * side_.group);
    if (!scale) {
      kept_[token] = 0;
      p_.refused[layer_] = 1;
      return;
    }
    std::byte* const at = page_ + scale_place(l_, head_, is_key_, group, place(token));
    if (side_.scale_bytes() == 2) *reinterpret_cast<uint16_t*>(at) = scale->scale;
    else *at = static_cast<std::byte>(scale->scale);
    if (side_.zeros) row(token)[l_.head_dim + group] = static_cast<uint8_t>(scale->zero);
  }

  /// A code's share of a plane.
  __device__ uint32_t share(uint8_t code, int width) const { return code >> plane_shift(side_.bits, width) & ((1U << width) - 1); }
  /// Where element i of a word lies.
  static __device__ int element_shift(int i, int width) { return 8 * (i % 4) + width * (i / 4); }

  /// A word is of one token, so it is written whole; bits of no channel are 0.
  __device__ void write_keys(int width) const {
    const int per_word = 32 / width;
    for (int i = static_cast<int>(threadIdx.x); i < n_tokens_ * l_.key_words(width); i += threads_) {
      const int token = first_ + i % n_tokens_;
      if (kept_[token] == 0) continue;
      const int channel = i / n_tokens_ * per_word;
      uint32_t bits = 0;
      for (int e = 0; e < min(per_word, l_.head_dim - channel); ++e) bits |= share(row(token)[channel + e], width) << element_shift(e, width);
      word(key_place(l_, head_, width, place(token), channel).word) = bits;
    }
  }

  /// A word is of several tokens: those that are not stored keep their bits.
  __device__ void write_values(int width) const {
    const int per_word = 32 / width;
    for (int i = static_cast<int>(threadIdx.x); i < width * l_.head_dim; i += threads_) {
      const int channel = i % l_.head_dim;
      merge(i / l_.head_dim * per_word, width, channel, [&](int token) { return value_place(l_, head_, width, token, channel).word; },
            [&](int e) { return element_shift(e, width); });
    }
  }
  __device__ void write_zeros(int width) const {
    const int per_word = 32 / width;
    for (int i = static_cast<int>(threadIdx.x); i < width * l_.groups(side_); i += threads_) {
      const int group = i / width;
      merge(i % width * per_word, width, l_.head_dim + group,
            [&](int64_t token) { return zero_place(l_, head_, is_key_, width, group, token).word; }, [&](int e) { return width * e; });
    }
  }

  /// Puts byte `at` of the rows of tokens from `token` on into their word. @param where of the first token   @param shift of an element
  template <typename Where, typename Shift>
  __device__ void merge(int token, int width, int at, const Where& where, const Shift& shift) const {
    uint32_t mask = 0;
    uint32_t bits = 0;
    for (int e = 0; e < 32 / width; ++e) {
      if (kept_[token + e] == 0) continue;
      mask |= ((1U << width) - 1) << shift(e);
      bits |= share(row(token + e)[at], width) << shift(e);
    }
    if (mask == 0) return;
    uint32_t& to = word(where(place(token)));
    to = (to & ~mask) | bits;
  }

  const GroupedStoreBatch& p_;
  const GroupedPageLayout& l_;
  const GroupedSide& side_;
  const StorePair pair_;
  const int layer_;
  const int head_;
  const bool is_key_;
  std::byte* const page_;
  const int first_;     ///< token of the pair that is stored
  const int n_tokens_;  ///< that are
  const int threads_;
  uint8_t* const codes_;  ///< [token] rows
  uint8_t* const kept_;   ///< [token] 1: it is stored
};

}  // namespace rotunda::kv::grouped
