// Decode attention over rotate2 pages on a GPU against the scalar reference.

#include <gtest/gtest.h>

#include "kernels/run_on_gpu.h"
#include "kv/rotate/kernels/rotate_decode_case.h"
#include "kv/rotate/kernels/rotate_decode_cuda.h"

namespace rotunda::kv::rotate {
namespace {

using kernels::testing::check_cuda;
using kernels::testing::OnGpu;
using kernels::testing::PagedCase;

class RotateDecodeGpuTest : public ::testing::Test {
 protected:
  void SetUp() override { ROTUNDA_SKIP_WITHOUT_GPU(); }

  void expect_reference(const PagedCase::Shape& shape, ZeroPoint zero, int group_size) {
    testing::DecodeCase test(shape, zero, group_size);
    kernels::PagedDecodeGrid grid;
    check_cuda(rotate_decode_grid(&grid), "grid");
    const OnGpu key_offsets(test.key_offsets), token_table(test.token_table), page_table(test.page_table);
    const auto bytes = rotate_decode_workspace_bytes(grid, static_cast<int>(shape.lens.size()), shape.n_kv_heads);
    const OnGpu workspace(std::vector<std::byte>(static_cast<size_t>(bytes)));
    const auto out = kernels::testing::run_on_gpu(test.paged, grid, [&](kernels::PagedDecode p) {
      p.rotate = test.params();
      p.rotate.key_offsets = key_offsets.as<uint16_t>();
      p.rotate.token_table = token_table.as<uint4>();
      p.rotate.page_table = page_table.as<float2>();
      p.workspace = workspace.as<std::byte>();
      return rotate_decode_cuda(p, grid, nullptr);
    });
    EXPECT_LT(PagedCase::relative_error(out, test.expected()), testing::kDecodeTolerance);
  }
};

TEST_F(RotateDecodeGpuTest, FewTokens) {
  expect_reference({.lens = {140, 5}, .n_kv_heads = 4, .exact_blocks = 0}, ZeroPoint::kCode, 128);
  expect_reference({.lens = {77, 200}, .n_kv_heads = 8, .exact_blocks = 3, .masked = true}, ZeroPoint::kMinimum, 256);
}
TEST_F(RotateDecodeGpuTest, LongAndShort) {
  expect_reference({.lens = {3000, 3, 128}, .n_kv_heads = 8, .exact_blocks = 6}, ZeroPoint::kCode, 128);
}
TEST_F(RotateDecodeGpuTest, ManyGroups) {
  expect_reference({.lens = {300, 40}, .n_kv_heads = 40, .exact_blocks = 1}, ZeroPoint::kCode, 128);
}
TEST_F(RotateDecodeGpuTest, Refuses) {
  kernels::PagedDecode p;
  p.n_kv_heads = 6;
  p.n_q = 4;
  p.head_dim = 128;
  EXPECT_EQ(rotate_decode_cuda(p, {1, 8}, nullptr), cudaErrorInvalidValue);
}

}  // namespace
}  // namespace rotunda::kv::rotate
