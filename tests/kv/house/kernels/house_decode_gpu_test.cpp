// Decode attention over rotunda2/3/4 pages on a GPU against the scalar reference.

#include <gtest/gtest.h>

#include "kernels/run_on_gpu.h"
#include "kv/house/kernels/house_decode_cuda.h"
#include "kv/house/kernels/house_paged_case.h"

namespace rotunda::kv::house {
namespace {

using kernels::testing::PagedCase;

class HouseDecodeGpuTest : public ::testing::Test {
 protected:
  void SetUp() override { ROTUNDA_SKIP_WITHOUT_GPU(); }

  void expect_reference(int key_bits, int value_bits, const PagedCase::Shape& shape, bool shifted = false) {
    const HousePageLayout layout{key_bits, value_bits, shape.n_kv_heads, shape.head_dim, PagedCase::kPageTokens / 16};
    PagedCase test = testing::house_case(shape, layout);
    kernels::PagedDecodeGrid grid;
    kernels::testing::check_cuda(house_decode_grid(test.params({1, 1}), key_bits, value_bits, &grid), "grid");
    testing::ShiftCase shift(test);
    using kernels::testing::OnGpu;
    const OnGpu turns(shift.turns), queries(shift.queries), norm(shift.norm);
    if (shifted) test.shift = {testing::ShiftCase::kSteps, turns.as<uint4>(), queries.as<uint2>(), shift.pages, norm.as<float>()};
    const auto out = kernels::testing::run_on_gpu(
        test, grid, [&](const kernels::PagedDecode& p) { return house_decode_cuda(p, key_bits, value_bits, grid, nullptr); });
    EXPECT_LT(PagedCase::relative_error(out, testing::house_expected(test, layout, shifted ? &shift : nullptr)), testing::kTolerance);
  }
};

TEST_F(HouseDecodeGpuTest, EveryKernel) {
  for (int key_bits = 2; key_bits <= 4; ++key_bits) {
    for (int value_bits = 2; value_bits <= 4; ++value_bits) {
      for (const int head_dim : {64, 128, 256}) {
        for (const int n_q : {1, 4, 7}) {
          SCOPED_TRACE(::testing::Message() << key_bits << " " << value_bits << " " << head_dim << " " << n_q);
          expect_reference(key_bits, value_bits, {.lens = {700, 1, 129}, .n_q = n_q, .head_dim = head_dim, .exact_blocks = 2, .masked = true});
        }
      }
    }
  }
}
TEST_F(HouseDecodeGpuTest, Shifted) {
  expect_reference(2, 2, {.lens = {5000, 300}}, true);
  expect_reference(4, 4, {.lens = {300}, .n_q = 6, .head_dim = 64, .masked = true}, true);
}
TEST_F(HouseDecodeGpuTest, SlidingWindows) {
  for (const bool masked : {false, true}) {
    expect_reference(2, 2, {.lens = {5000, 77, 300, 20}, .masked = masked, .first_tokens = {2189, 0, 256, 35}});
  }
}
TEST_F(HouseDecodeGpuTest, LongAndShort) {
  expect_reference(2, 2, {.lens = {20000, 3, 128}, .n_kv_heads = 2, .exact_blocks = 6});
  expect_reference(2, 2, {.lens = {1, 257, 2, 640}, .n_kv_heads = 3, .n_q = 1, .exact_blocks = 0});
  expect_reference(2, 2, {.lens = {0}, .n_kv_heads = 1});
}
TEST_F(HouseDecodeGpuTest, Refuses) {
  kernels::PagedDecodeGrid grid;
  EXPECT_EQ(house_decode_grid({.n_q = 4, .head_dim = 80}, 2, 2, &grid), cudaErrorInvalidValue);
  EXPECT_EQ(house_decode_grid({.n_q = 9, .head_dim = 64}, 2, 2, &grid), cudaErrorInvalidValue);
  EXPECT_EQ(house_decode_grid({.n_q = 4, .head_dim = 64}, 5, 2, &grid), cudaErrorInvalidValue);
}

}  // namespace
}  // namespace rotunda::kv::house
