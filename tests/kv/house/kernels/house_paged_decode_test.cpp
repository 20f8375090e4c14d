// The GPU's decode attention over rotunda2/3/4 pages, its kernel run on the CPU by an emulation of warps (tests/cuda_emulation).

#include <gtest/gtest.h>

#include "kernels/attention/plain_block.cuh"
#include "kernels/hadamard/hadamard_ref.h"
#include "kernels/run_emulated.h"
#include "kv/house/kernels/house_page_codec.cuh"
#include "kv/house/kernels/house_paged_case.h"
#include "kv/house/kernels/shift_query.cuh"

namespace rotunda::kv::house {
namespace {

using kernels::testing::PagedCase;

template <int kKeyBits, int kValueBits, int kHeadDim, int kSets, int kWarps, int kStages>
using Kernel = kernels::PagedDecodeKernel<HousePageCodec<kKeyBits, kValueBits, kHeadDim, kSets>,
                                          kernels::PlainBlock<__half, kHeadDim, kSets, false, PagedCase::kPageTokens>, kHeadDim, kSets,
                                          kWarps, kStages, PagedCase::kPageTokens>;

template <int kKeyBits, int kValueBits, int kHeadDim, int kSets, int kWarps, int kStages>
void expect_reference(PagedCase::Shape shape, int blocks, bool shifted = false) {
  shape.head_dim = kHeadDim;
  const HousePageLayout layout{kKeyBits, kValueBits, shape.n_kv_heads, kHeadDim, PagedCase::kPageTokens / 16};
  PagedCase test = testing::house_case(shape, layout);
  testing::ShiftCase shift(test);
  if (shifted) test.shift = shift.params();
  using Tested = Kernel<kKeyBits, kValueBits, kHeadDim, kSets, kWarps, kStages>;
  const auto out = kernels::testing::run_emulated<Tested>(test, blocks);
  EXPECT_LT(PagedCase::relative_error(out, testing::house_expected(test, layout, shifted ? &shift : nullptr)), testing::kTolerance);
}

TEST(HousePagedDecodeTest, TwoBits) { expect_reference<2, 2, 128, 1, 4, 2>({.lens = {300, 1000, 128, 5}, .exact_blocks = 2}, 3); }
TEST(HousePagedDecodeTest, Masked) { expect_reference<2, 2, 128, 1, 2, 3>({.lens = {300, 700}, .exact_blocks = 6, .masked = true}, 2); }
TEST(HousePagedDecodeTest, SlidingWindows) {
  for (const bool masked : {false, true}) {
    expect_reference<2, 2, 128, 1, 2, 2>(
        {.lens = {600, 77, 300, 20, 0}, .masked = masked, .first_tokens = {143, 0, 256, 35, 7}}, 3);
  }
}
TEST(HousePagedDecodeTest, OneHeadNothingExact) {
  expect_reference<2, 2, 128, 1, 2, 2>({.lens = {1, 257, 2, 640}, .n_kv_heads = 3, .n_q = 1, .exact_blocks = 0}, 3);
}
TEST(HousePagedDecodeTest, SevenHeads) { expect_reference<2, 2, 128, 2, 2, 2>({.lens = {513}, .n_kv_heads = 1, .n_q = 7, .masked = true}, 2); }
TEST(HousePagedDecodeTest, Shifted) {
  expect_reference<2, 2, 128, 1, 2, 2>({.lens = {700, 300}}, 2, true);
  expect_reference<4, 4, 64, 2, 2, 2>({.lens = {300}, .n_q = 6, .masked = true}, 2, true);
}
TEST(HousePagedDecodeTest, ThreeBits) { expect_reference<3, 3, 128, 1, 2, 2>({.lens = {300, 640}, .masked = true}, 3); }
TEST(HousePagedDecodeTest, FourBits) { expect_reference<4, 4, 128, 1, 2, 2>({.lens = {300, 640}, .masked = true}, 3); }
TEST(HousePagedDecodeTest, KeysAndValuesDiffer) {
  expect_reference<2, 4, 128, 1, 2, 2>({.lens = {300}, .n_q = 3}, 3);
  expect_reference<3, 2, 64, 1, 2, 2>({.lens = {300}, .n_q = 3}, 3);
  expect_reference<4, 3, 64, 1, 2, 2>({.lens = {300}, .n_q = 3}, 3);
}
TEST(HousePagedDecodeTest, NarrowAndWideHeads) {
  expect_reference<2, 2, 64, 1, 2, 2>({.lens = {300, 0}, .n_q = 2}, 3);
  expect_reference<2, 2, 64, 2, 2, 2>({.lens = {200}, .n_q = 8}, 3);
  expect_reference<2, 2, 256, 1, 2, 2>({.lens = {300}, .n_q = 2}, 3);
  expect_reference<3, 4, 256, 1, 2, 2>({.lens = {300}, .n_kv_heads = 1, .n_q = 2}, 3);
}

// Operands times turns of a page's places are q R_m . mu R_n for every pair, position and head.
template <int kHeadDim, int kSets>
void expect_shift_operands(int n_q) {
  constexpr int kHalf = kHeadDim / 2, kSteps = 2, kHeads = 2, kPages = 19, kBatch = 2;
  std::mt19937 random(5);
  std::normal_distribution<float> normal;
  std::vector<float> q(kBatch * kHeads * n_q * kHeadDim), mu(kHeads * kHeadDim), norm(kBatch * kHeads * n_q, -1.0F);
  for (auto* x : {&q, &mu})
    for (float& element : *x) element = normal(random);
  std::vector<uint16_t> pairs(kHeads * 8 * kSteps);
  for (size_t i = 0; i < pairs.size(); ++i) pairs[i] = static_cast<uint16_t>(i * 7 % kHalf);
  const std::vector<int32_t> n_pairs = {16, 9}, stored_len = {kPages * 128 - 5, 700}, first_token = {0, 300};
  const auto frequency = [](int pair) { return std::pow(1e4, -static_cast<double>(pair) / kHalf); };
  std::vector<float2> page_table;
  for (int page = 0; page < kPages; ++page)
    for (int pair = 0; pair < kHalf; ++pair)
      page_table.push_back(make_float2(static_cast<float>(std::cos(128 * page * frequency(pair))), static_cast<float>(std::sin(128 * page * frequency(pair)))));
  std::vector<uint2> queries(kBatch * kHeads * kPages * kSteps * kSets * 32, make_uint2(0x7c007c00, 0x7c007c00));
  const ShiftQueries p{kBatch,         kHeads,           n_q,               kHeadDim,           q.data(), kSteps,         mu.data(),  pairs.data(),
                       n_pairs.data(), page_table.data(), stored_len.data(), first_token.data(), kPages,   queries.data(), norm.data()};
  const unsigned warps = static_cast<unsigned>(shift_query_warps(kBatch, kHeads, kPages));
  emulation::launch(warps, 32, [&] { shift_query_warp<kHeadDim, kSets>(p, static_cast<int>(blockIdx.x)); });
  for (int row = 0; row < kBatch * kHeads * n_q; ++row) {
    const int seq = row / n_q / kHeads, head = row / n_q % kHeads, h = row % n_q;
    for (int page = first_token[seq] / 128; page < (stored_len[seq] + 127) / 128; ++page) {
      for (int place = 0; place < 8 * kSteps; ++place) {
        const int64_t at = ((int64_t{seq} * kHeads + head) * kPages + page) * kSteps + place / 8;
        double got[2] = {};  // what goes with cos and with sin
        for (int rest = 0; rest < 2; ++rest) {
          const uint2 both = queries[(at * kSets + h / 4) * 32 + (h % 4 * 2 + rest) * 4 + place % 4];
          const uint32_t word = place % 8 < 4 ? both.x : both.y;
          got[0] += to_float(Half{static_cast<uint16_t>(word)});
          got[1] += to_float(Half{static_cast<uint16_t>(word >> 16)});
        }
        EXPECT_LE(std::hypot(got[0], got[1]), 1.0001);
        const int pair = pairs[head * 8 * kSteps + place];
        const float* const query = q.data() + int64_t{row} * kHeadDim;
        const float* const shift = mu.data() + head * kHeadDim;
        for (const int j : {0, 1, 77, 127}) {
          const double angle = (128 * page + j) * frequency(pair);
          const double turned = shift[pair] * std::cos(angle) - shift[pair + kHalf] * std::sin(angle);
          const double turned_half = shift[pair + kHalf] * std::cos(angle) + shift[pair] * std::sin(angle);
          const double expected = place < n_pairs[head] ? query[pair] * turned + query[pair + kHalf] * turned_half : 0.0;
          const double within = j * frequency(pair);
          // 22 bits of sums of up to 20.
          ASSERT_NEAR(norm[row] * (got[0] * std::cos(within) + got[1] * std::sin(within)), expected, 2e-5) << row << " " << page << " " << place;
        }
      }
    }
  }
}
TEST(ShiftQueryTest, OperandsAreTheProductTheyStandFor) {
  expect_shift_operands<64, 1>(3);
  expect_shift_operands<128, 2>(7);
}

}  // namespace
}  // namespace rotunda::kv::house
