// Decode attention over 16-bit pages on a GPU against the scalar reference.

#include <gtest/gtest.h>

#include "kernels/attention/plain_decode_cuda.h"
#include "kernels/plain_paged_case.h"
#include "kernels/run_on_gpu.h"

namespace rotunda::kernels {
namespace {

using testing::PagedCase;

class PlainDecodeGpuTest : public ::testing::Test {
 protected:
  void SetUp() override { ROTUNDA_SKIP_WITHOUT_GPU(); }

  void expect_reference(ElementType type, const PagedCase::Shape& shape) {
    const PlainPageLayout layout{type, shape.n_kv_heads, shape.head_dim, PagedCase::kPageTokens / 16};
    PagedCase test = testing::plain_case(shape, layout, kPlainUnitTokens);
    const auto expected = testing::plain_expected(test, layout);
    PagedDecodeGrid grid;
    testing::check_cuda(plain_decode_grid(test.params({1, 1}), type, &grid), "grid");
    const auto out = testing::run_on_gpu(test, grid, [&](const PagedDecode& p) { return plain_decode_cuda(p, type, grid, nullptr); });
    // As in plain_paged_decode_test, and the GPU's fast exponential.
    EXPECT_LT(PagedCase::relative_error(out, expected), type == ElementType::kBf16 ? 2e-5 : 5e-6);
  }
};

TEST_F(PlainDecodeGpuTest, Ragged) {
  for (const int head_dim : {64, 128, 256}) {
    for (const int n_q : {1, 4, 7}) {
      SCOPED_TRACE(::testing::Message() << head_dim << " " << n_q);
      expect_reference(ElementType::kBf16, {.lens = {2000, 1, 129, 16}, .n_q = n_q, .head_dim = head_dim, .exact_blocks = 0});
      expect_reference(ElementType::kFp16, {.lens = {700, 31}, .n_q = n_q, .head_dim = head_dim, .exact_blocks = 3, .masked = true});
    }
  }
}
TEST_F(PlainDecodeGpuTest, SlidingWindows) {
  for (const bool masked : {false, true}) {
    expect_reference(ElementType::kBf16,
                     {.lens = {2000, 77, 300, 20}, .masked = masked, .first_tokens = {1003, 0, 128, 35}});
  }
}
TEST_F(PlainDecodeGpuTest, FewUnits) { expect_reference(ElementType::kFp16, {.lens = {20, 0, 0}, .n_q = 3, .head_dim = 64, .slots = false}); }
TEST_F(PlainDecodeGpuTest, Refuses) {
  PagedDecodeGrid grid;
  EXPECT_EQ(plain_decode_grid({.n_q = 4, .head_dim = 80}, ElementType::kBf16, &grid), cudaErrorInvalidValue);
  EXPECT_EQ(plain_decode_grid({.n_q = 9, .head_dim = 64}, ElementType::kBf16, &grid), cudaErrorInvalidValue);
  EXPECT_EQ(plain_decode_grid({.n_q = 4, .head_dim = 64}, ElementType::kFp32, &grid), cudaErrorInvalidValue);
}

}  // namespace
}  // namespace rotunda::kernels
