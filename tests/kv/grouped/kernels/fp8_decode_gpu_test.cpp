// Decode attention over fp8 pages on a GPU against the scalar reference.

#include <gtest/gtest.h>

#include "kernels/run_on_gpu.h"
#include "kv/grouped/kernels/fp8_decode_cuda.h"
#include "kv/grouped/kernels/fp8_paged_case.h"

namespace rotunda::kv::grouped {
namespace {

using kernels::PagedDecode;
using kernels::testing::PagedCase;

class Fp8DecodeGpuTest : public ::testing::Test {
 protected:
  void SetUp() override { ROTUNDA_SKIP_WITHOUT_GPU(); }

  static void expect_reference(const PagedCase::Shape& shape) {
    const GroupedLayer layer = testing::fp8_layer(shape.n_kv_heads, shape.head_dim);
    PagedCase test = testing::fp8_case(shape, layer);
    const auto expected = testing::fp8_expected(test, layer);
    kernels::PagedDecodeGrid grid;
    kernels::testing::check_cuda(fp8_decode_grid(test.params({1, 1}), &grid), "grid");
    const auto out = kernels::testing::run_on_gpu(test, grid, [&](const PagedDecode& p) { return fp8_decode_cuda(p, grid, nullptr); });
    // As in fp8_paged_decode_test, and the GPU's fast exponential and reciprocal.
    EXPECT_LT(PagedCase::relative_error(out, expected), 1e-5);
  }
};

TEST_F(Fp8DecodeGpuTest, Ragged) {
  for (const int head_dim : {64, 128, 256}) {
    for (const int n_q : {1, 4, 7}) {
      SCOPED_TRACE(::testing::Message() << head_dim << " " << n_q);
      expect_reference({.lens = {2000, 1, 129, 32}, .n_q = n_q, .head_dim = head_dim, .exact_blocks = 0});
      expect_reference({.lens = {700, 31}, .n_q = n_q, .head_dim = head_dim, .exact_blocks = 3, .masked = true});
    }
  }
}
TEST_F(Fp8DecodeGpuTest, SlidingWindows) {
  for (const bool masked : {false, true}) expect_reference({.lens = {2000, 77, 300, 20}, .masked = masked, .first_tokens = {1003, 0, 128, 35}});
}
TEST_F(Fp8DecodeGpuTest, FewUnits) { expect_reference({.lens = {20, 0, 0}, .n_q = 3, .head_dim = 64, .slots = false}); }
TEST_F(Fp8DecodeGpuTest, Refuses) {
  kernels::PagedDecodeGrid grid;
  EXPECT_EQ(fp8_decode_grid({.n_q = 4, .head_dim = 80}, &grid), cudaErrorInvalidValue);
  EXPECT_EQ(fp8_decode_grid({.n_q = 9, .head_dim = 64}, &grid), cudaErrorInvalidValue);
}

}  // namespace
}  // namespace rotunda::kv::grouped
