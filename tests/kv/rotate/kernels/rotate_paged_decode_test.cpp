// The GPU's decode attention over rotate2 pages, its kernel run on the CPU by an emulation of warps (tests/cuda_emulation).

#include <gtest/gtest.h>

#include "cuda_runtime.h"
#include "kv/rotate/kernels/rotate_decode_case.h"
#include "kv/rotate/kernels/rotate_page_codec.cuh"

namespace rotunda::kv::rotate {
namespace {

using kernels::testing::PagedCase;

void expect_reference(const PagedCase::Shape& shape, ZeroPoint zero, int group_size, int blocks) {
  using Kernel = kernels::PagedDecodeKernel<RotatePageCodec, RotatePageCodec::Exact, kRotateHeadDim, kRotateHeads, 2, 2,
                                            PagedCase::kPageTokens>;
  testing::DecodeCase test(shape, zero, group_size);
  const kernels::PagedDecodeGrid grid{blocks, Kernel::kThreads / 32};
  kernels::PagedDecode p = test.paged.params(grid);
  const int batch = static_cast<int>(shape.lens.size());
  const auto bytes = kernels::paged_decode_workspace_bytes(grid, batch, shape.n_kv_heads / kRotateHeads, kRotateHeads * shape.n_q,
                                                           shape.head_dim);
  const rotunda::testing::AlignedBytes workspace(static_cast<size_t>(bytes), 0xff);
  std::memset(workspace.get(), 0, static_cast<size_t>(batch) * shape.n_kv_heads * 4);
  p.workspace = workspace.get();
  p.rotate = test.params();
  p = rotate_of_groups(p);
  const rotunda::testing::AlignedBytes shared(static_cast<size_t>(Kernel::kSharedBytes), 0xcd);
  for (int launch = 0; launch < 2; ++launch) {
    std::fill(test.paged.out.begin(), test.paged.out.end(), std::numeric_limits<float>::quiet_NaN());
    emulation::launch(static_cast<unsigned>(blocks), static_cast<unsigned>(Kernel::kThreads), [&] { Kernel::run(p, shared.get()); });
  }
  EXPECT_LT(PagedCase::relative_error(test.paged.out, test.expected()), testing::kDecodeTolerance);
}

TEST(RotatePagedDecodeTest, PagesAlone) {
  expect_reference({.lens = {140}, .n_kv_heads = 4, .exact_blocks = 0}, ZeroPoint::kCode, 128, 1);
}
TEST(RotatePagedDecodeTest, RaggedWithExactTokens) {
  expect_reference({.lens = {300, 5, 128}, .n_kv_heads = 8, .exact_blocks = 2}, ZeroPoint::kCode, 128, 3);
}
TEST(RotatePagedDecodeTest, Masked) {
  expect_reference({.lens = {77, 200}, .n_kv_heads = 4, .exact_blocks = 3, .masked = true}, ZeroPoint::kMinimum, 256, 2);
}
TEST(RotatePagedDecodeTest, ManyGroups) {
  expect_reference({.lens = {40}, .n_kv_heads = 20, .exact_blocks = 1}, ZeroPoint::kCode, 128, 2);
}

}  // namespace
}  // namespace rotunda::kv::rotate
