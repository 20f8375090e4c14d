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

/// A ragged batch with random queries, a block table in no order, and random 16-bit tokens beside the pages.
struct PagedCase {
  struct Shape {
    std::vector<int> lens;  ///< tokens in pages, of each sequence
    int n_kv_heads = 2;
    int n_q = 4;
    int head_dim = 128;
    int exact_blocks = 1;
    bool masked = false;  ///< some tokens are left out, by masks and because a sequence begins late; places are in another order than sequences
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
    units_before.assign(1, 0);
    for (const int len : shape.lens) units_before.push_back(units_before.back() + paged_decode_units(len, unit_tokens, shape.exact_blocks));
    place.resize(batch);
    std::iota(place.begin(), place.end(), 0);
    if (shape.masked) std::shuffle(place.begin(), place.end(), random);
    attended.resize(static_cast<size_t>(n_pages) * kPageTokens / 16);
    page_masks.assign(attended.size(), 0);
    for (int seq = 0; seq < batch; ++seq) {
      first_token.push_back(shape.masked && seq % 2 == 1 ? shape.lens[seq] / 3 : 0);
      // Masks may say anything of tokens that are not stored or lie before the first.
      for (int t = 0; t < table_stride * kPageTokens; ++t) {
        if (random() % 8 == 0) continue;
        page_masks[(int64_t{place[seq]} * table_stride * kPageTokens + t) / 16] |= static_cast<uint16_t>(1U << t % 16);
      }
      for (int t = first_token[seq]; t < shape.lens[seq]; ++t) {
        const bool masked = (page_masks[(int64_t{place[seq]} * table_stride * kPageTokens + t) / 16] >> t % 16 & 1) == 0;
        if (!shape.masked || !masked) attended[(int64_t{seq} * table_stride * kPageTokens + t) / 16] |= static_cast<uint16_t>(1U << t % 16);
      }
    }
    exact_layout = {ElementType::kFp16, shape.n_kv_heads, shape.head_dim, shape.exact_blocks};
    exact = AlignedBytes(static_cast<size_t>(batch * exact_layout.page_bytes()) + 64);
    fill_halves(exact.get(), batch * exact_layout.page_bytes() / 2);
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
            shape.masked ? first_token.data() : nullptr,
            shape.masked ? place.data() : nullptr,
            shape.masked ? page_masks.data() : nullptr,
            int64_t{table_stride} * kPageTokens / 16,
            exact.get(),
            exact_layout.page_bytes(),
            shape.exact_blocks,
            exact_masks.data(),
            units_before.data(),
            shift,
            workspace.get(),
            out.data()};
  }

  /// Outputs by the scalar references. @param decode_pages (run, sequence, kv head, queries [n_q][head_dim], state)
  template <typename DecodePages>
  std::vector<float> expected(const DecodePages& decode_pages) const {
    std::vector<float> result;
    const int d = shape.head_dim;
    for (size_t seq = 0; seq < shape.lens.size(); ++seq) {
      std::vector<const std::byte*> pages;
      for (int i = 0; i < (shape.lens[seq] + kPageTokens - 1) / kPageTokens; ++i)
        pages.push_back(pool.get() + block_table[seq * table_stride + i] * page_bytes);
      const PageRun run{pages.data(), attended.data() + seq * table_stride * kPageTokens / 16, static_cast<int>(pages.size())};
      const std::byte* const exact_page = exact.get() + int64_t{place[seq]} * exact_layout.page_bytes();
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
  std::vector<int32_t> block_table, stored_len, units_before, first_token, place;
  std::vector<uint16_t> page_masks, exact_masks;
  std::vector<uint16_t> attended;  ///< what masks, lengths and first tokens come to, [batch][table_stride * page_tokens / 16]
  PlainPageLayout exact_layout;
  AlignedBytes exact;
  std::vector<float> q_pages, q_exact, out;
  PagedShift shift;  ///< none, or what a test has put here
  AlignedBytes workspace;
};

}  // namespace rotunda::kernels::testing
