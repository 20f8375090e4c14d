// The GPU's decode attention over rotunda2/3/4 pages, its kernel run on the CPU by an emulation of warps (tests/cuda_emulation).

#include <gtest/gtest.h>

#include "kernels/attention/plain_block.cuh"
#include "kernels/hadamard/hadamard_ref.h"
#include "kernels/run_emulated.h"
#include "kv/house/kernels/house_page_codec.cuh"
#include "kv/house/kernels/house_paged_case.h"
#include "kv/house/kernels/house_query.cuh"

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

template <int kHeadDim>
void expect_rotated() {
  constexpr int kRows = 2 * 3;
  std::mt19937 random(6);
  std::normal_distribution<float> normal;
  std::vector<float> q(kRows * kHeadDim), rotated(q.size(), NAN);
  for (float& x : q) x = normal(random);
  HouseQueries p;
  p.batch = 2;
  p.n_kv_heads = 1;
  p.n_q = 3;
  p.head_dim = kHeadDim;
  p.q = q.data();
  p.rotated = rotated.data();
  emulation::launch(2, 4 * 32, [&] { house_query_warps<kHeadDim>(p, 4); });
  std::vector<double> expected(q.begin(), q.end());
  kernels::hadamard_rows_ref(kernels::hadamard_plan(kHeadDim), false, expected.data(), kRows, kHeadDim);
  // Up to eight additions in a row, of at most 16: 2^-24 each.
  for (size_t i = 0; i < expected.size(); ++i) EXPECT_NEAR(rotated[i], expected[i], 1e-5);
}
TEST(HouseQueryTest, Rotates) {
  expect_rotated<64>();
  expect_rotated<128>();
  expect_rotated<256>();
}

// a cos(n w) + b sin(n w) is q R_m . mu R_n for every pair, position and head.
TEST(HouseQueryTest, ShiftIsTheProductItStandsFor) {
  constexpr int kHeadDim = 64, kHalf = kHeadDim / 2, kSteps = 2, kHeads = 2, kQ = 3;
  std::mt19937 random(5);
  std::normal_distribution<float> normal;
  std::vector<float> q(2 * kHeads * kQ * kHeadDim), mu(kHeads * kHeadDim), norm(2 * kHeads * kQ, -1.0F);
  for (auto* x : {&q, &mu})
    for (float& element : *x) element = normal(random);
  std::vector<uint16_t> pairs(kHeads * 8 * kSteps);
  for (size_t i = 0; i < pairs.size(); ++i) pairs[i] = static_cast<uint16_t>(i * 7 % kHalf);
  const std::vector<int32_t> n_pairs = {16, 9};
  std::vector<float2> ab(2 * kHeads * kQ * 8 * kSteps, make_float2(NAN, NAN));
  std::vector<float> rotated(q.size());
  const HouseQueries p{2,           kHeads,       kQ,             kHeadDim,  q.data(),   rotated.data(), kSteps,
                       mu.data(), pairs.data(), n_pairs.data(), ab.data(), norm.data()};
  emulation::launch(3, 4 * 32, [&] { house_query_warps<kHeadDim>(p, 4); });
  for (int row = 0; row < 2 * kHeads * kQ; ++row) {
    const int head = row / kQ % kHeads;
    for (int i = 0; i < 8 * kSteps; ++i) {
      const float2 got = ab[row * 8 * kSteps + i];
      if (i >= n_pairs[head]) {
        EXPECT_EQ(got.x, 0.0F);
        EXPECT_EQ(got.y, 0.0F);
        continue;
      }
      EXPECT_LE(std::hypot(got.x, got.y), norm[row] * 1.000001F);
      const int pair = pairs[head * 8 * kSteps + i];
      const float* const query = q.data() + row * kHeadDim;
      const float* const shift = mu.data() + head * kHeadDim;
      for (const double angle : {0.0, 0.7, 2.9, 100.0}) {
        const double turned = shift[pair] * std::cos(angle) - shift[pair + kHalf] * std::sin(angle);
        const double turned_half = shift[pair + kHalf] * std::cos(angle) + shift[pair] * std::sin(angle);
        EXPECT_NEAR(got.x * std::cos(angle) + got.y * std::sin(angle), query[pair] * turned + query[pair + kHalf] * turned_half, 1e-5);
      }
    }
  }
}

}  // namespace
}  // namespace rotunda::kv::house
