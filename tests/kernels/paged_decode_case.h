#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <random>
#include <vector>

#include "base/half.h"
#include "kernels/aligned.h"
#include "kernels/attention/decode_attention_ref.h"
#include "kernels/attention/paged_decode.h"

namespace rotunda::kernels::testing {

using rotunda::testing::AlignedBytes;

/// A ragged batch with random queries, a block table and slots in no order, and random 16-bit tokens beside the pages.
struct PagedCase {
  struct Shape {
    std::vector<int> lens;  ///< tokens in pages, of each sequence
    int n_kv_heads = 2;
    int n_q = 4;
    int head_dim = 128;
    int exact_blocks = 1;
    bool masked = false;                 ///< some tokens are left out
    bool slots = true;                   ///< in no order; else none are given
    std::vector<int> first_tokens = {};  ///< sliding windows; none, or one of each sequence
  };
  static constexpr int kPageTokens = 128;

  /// @param fill_page makes page content: (bytes, random numbers)
  template <typename FillPage>
  PagedCase(const Shape& of_case, int64_t bytes_of_page, int unit_tokens, uint32_t seed, const FillPage& fill_page)
      : shape(of_case), page_bytes(bytes_of_page), random(seed) {
    const int batch = static_cast<int>(shape.lens.size());
    for (const int len : shape.lens) table_stride = std::max(table_stride, (len + kPageTokens - 1) / kPageTokens);
    const int n_pages = batch * table_stride;
    pool = AlignedBytes(static_cast<size_t>(n_pages * page_bytes));
    for (int page = 0; page < n_pages; ++page) fill_page(pool.get() + page * page_bytes, random);
    block_table.resize(n_pages);
    std::iota(block_table.begin(), block_table.end(), 0);
    std::shuffle(block_table.begin(), block_table.end(), random);
    stored_len.assign(shape.lens.begin(), shape.lens.end());
    first_token.assign(shape.first_tokens.begin(), shape.first_tokens.end());
    units_before.assign(1, 0);
    for (int seq = 0; seq < batch; ++seq)
      units_before.push_back(units_before.back() +
                             paged_decode_units(stored_len[seq], unit_tokens, shape.exact_blocks, first_of(seq)));
    // More slots than sequences, as a cache has that holds others too.
    const int n_slots = batch + 2;
    slot.resize(n_slots);
    std::iota(slot.begin(), slot.end(), 0);
    if (shape.slots) std::shuffle(slot.begin(), slot.end(), random);
    slot.resize(batch);
    // Bits of tokens that are not stored mean nothing.
    mask_stride = table_stride * kPageTokens / 16 + 3;
    for (int64_t i = 0; i < n_slots * mask_stride; ++i)
      page_masks.push_back(static_cast<uint16_t>(random() | random() | random()));
    exact_layout = {ElementType::kFp16, shape.n_kv_heads, shape.head_dim, shape.exact_blocks};
    exact = AlignedBytes(static_cast<size_t>(n_slots * exact_layout.page_bytes()) + 64);
    fill_halves(exact.get(), n_slots * exact_layout.page_bytes() / 2);
    for (int i = 0; i < batch * shape.exact_blocks; ++i) exact_masks.push_back(static_cast<uint16_t>(random()));
    const size_t n = static_cast<size_t>(batch) * shape.n_kv_heads * shape.n_q * shape.head_dim;
    std::normal_distribution<float> normal(0, 0.2F);
    for (auto* q : {&q_pages, &q_exact})
      for (size_t i = 0; i < n; ++i) q->push_back(normal(random));
    out.assign(n, std::numeric_limits<float>::quiet_NaN());
  }

  void fill_halves(std::byte* to, int64_t n) {
    std::normal_distribution<float> normal;
    for (int64_t i = 0; i < n; ++i) {
      const Half x = to_half(normal(random));
      std::memcpy(to + 2 * i, &x, 2);
    }
  }

  PagedDecode params(const PagedDecodeGrid& grid) {
    const int batch = static_cast<int>(shape.lens.size());
    workspace = AlignedBytes(
        static_cast<size_t>(paged_decode_workspace_bytes(grid, batch, shape.n_kv_heads, shape.n_q, shape.head_dim)), 0xff);
    std::memset(workspace.get(), 0, static_cast<size_t>(batch) * shape.n_kv_heads * 4);
    return {batch,
            shape.n_kv_heads,
            shape.n_q,
            shape.head_dim,
            q_pages.data(),
            q_exact.data(),
            pool.get(),
            page_bytes,
            block_table.data(),
            table_stride,
            stored_len.data(),
            first_token.empty() ? nullptr : first_token.data(),
            shape.slots ? slot.data() : nullptr,
            shape.masked ? page_masks.data() : nullptr,
            mask_stride,
            exact.get(),
            exact_layout.page_bytes(),
            shape.exact_blocks,
            exact_masks.data(),
            units_before.data(),
            shift,
            workspace.get(),
            out.data()};
  }

  int first_of(size_t seq) const { return first_token.empty() ? 0 : first_token[seq]; }

  /// Outputs by the scalar references. @param decode_pages (run, sequence, kv head, queries [n_q][head_dim], state)
  template <typename DecodePages>
  std::vector<float> expected(const DecodePages& decode_pages) const {
    std::vector<float> result;
    const int d = shape.head_dim;
    for (size_t seq = 0; seq < shape.lens.size(); ++seq) {
      std::vector<const std::byte*> pages;
      for (int i = 0; i < (shape.lens[seq] + kPageTokens - 1) / kPageTokens; ++i)
        pages.push_back(pool.get() + block_table[seq * table_stride + i] * page_bytes);
      std::vector<uint16_t> masks(pages.size() * kPageTokens / 16);
      for (int t = first_of(seq); t < shape.lens[seq]; ++t) {
        const unsigned kept = shape.masked ? page_masks[slot[seq] * mask_stride + t / 16] : 0xffffU;
        masks[t / 16] |= static_cast<uint16_t>(kept & 1U << t % 16);
      }
      const PageRun run{pages.data(), masks.data(), static_cast<int>(pages.size())};
      const std::byte* const exact_page = exact.get() + slot[seq] * exact_layout.page_bytes();
      const PageRun exact_run{&exact_page, exact_masks.data() + seq * shape.exact_blocks, shape.exact_blocks > 0 ? 1 : 0};
      for (int head = 0; head < shape.n_kv_heads; ++head) {
        std::vector<float> max(shape.n_q, -std::numeric_limits<float>::infinity());
        std::vector<float> sum(shape.n_q);
        std::vector<float> acc(static_cast<size_t>(shape.n_q) * d);
        const SoftmaxState state{max.data(), sum.data(), acc.data()};
        const size_t at = (seq * shape.n_kv_heads + head) * shape.n_q * d;
        decode_pages(run, static_cast<int>(seq), head, q_pages.data() + at, state);
        decode_plain_ref({exact_layout, exact_run, head, shape.n_q, q_exact.data() + at, state});
        for (size_t i = 0; i < acc.size(); ++i) result.push_back(sum[i / d] > 0 ? acc[i] / sum[i / d] : 0.0F);
      }
    }
    return result;
  }

  /// ||out - expected|| / ||expected||; NaN where an output was not written.
  static double relative_error(const std::vector<float>& out, const std::vector<float>& expected) {
    double error = 0;
    double norm = 0;
    for (size_t i = 0; i < expected.size(); ++i) {
      error += (double{out[i]} - expected[i]) * (double{out[i]} - expected[i]);
      norm += double{expected[i]} * expected[i];
    }
    return std::sqrt(error / norm);
  }

  Shape shape;
  int64_t page_bytes;
  std::mt19937 random;
  int table_stride = 1;
  AlignedBytes pool;
  std::vector<int32_t> block_table, stored_len, first_token, slot, units_before;
  std::vector<uint16_t> page_masks, exact_masks;
  int64_t mask_stride = 0;
  PlainPageLayout exact_layout;
  AlignedBytes exact;
  std::vector<float> q_pages, q_exact, out;
  PagedShift shift;  ///< none, or what a test has put here
  AlignedBytes workspace;
};

}  // namespace rotunda::kernels::testing
