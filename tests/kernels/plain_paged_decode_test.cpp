// The GPU's decode attention over 16-bit pages, its kernel run on the CPU by an emulation of warps (tests/cuda_emulation).

#include <gtest/gtest.h>

#include "kernels/attention/plain_block.cuh"
#include "kernels/plain_paged_case.h"
#include "kernels/run_emulated.h"

namespace rotunda::kernels {
namespace {

using testing::PagedCase;

template <typename T, int kHeadDim, int kSets, int kWarps, int kStages>
using Kernel = PagedDecodeKernel<PlainBlock<T, kHeadDim, kSets, true, PagedCase::kPageTokens>,
                                 PlainBlock<__half, kHeadDim, kSets, false, PagedCase::kPageTokens>, kHeadDim, kSets, kWarps, kStages,
                                 PagedCase::kPageTokens>;

// Queries and probabilities enter as two 16-bit numbers each: 16 bits of mantissa with bf16, 22 with fp16; sums are in fp32.
template <typename Kernel>
void expect_reference(ElementType type, const PagedCase::Shape& shape, int blocks) {
  const PlainPageLayout layout{type, shape.n_kv_heads, shape.head_dim, PagedCase::kPageTokens / 16};
  PagedCase test = testing::plain_case(shape, layout, 16);
  const auto expected = testing::plain_expected(test, layout);
  EXPECT_LT(PagedCase::relative_error(testing::run_emulated<Kernel>(test, blocks), expected), type == ElementType::kBf16 ? 1e-5 : 2e-6);
}

TEST(PlainPagedDecodeTest, Bf16) {
  expect_reference<Kernel<__nv_bfloat16, 128, 1, 4, 3>>(ElementType::kBf16, {.lens = {300, 77, 1}, .exact_blocks = 0}, 2);
}
TEST(PlainPagedDecodeTest, SixHeadsMaskedWithExactTokens) {
  expect_reference<Kernel<__half, 64, 2, 2, 2>>(
      ElementType::kFp16, {.lens = {130, 77, 1}, .n_q = 6, .head_dim = 64, .exact_blocks = 2, .masked = true}, 3);
}
TEST(PlainPagedDecodeTest, WideHead) {
  expect_reference<Kernel<__half, 256, 1, 2, 2>>(ElementType::kFp16,
                                                 {.lens = {100, 16}, .n_kv_heads = 1, .n_q = 1, .head_dim = 256, .exact_blocks = 0}, 2);
}
// A warp's share has more (sequence, kv head)s than it brings to their end at once.
TEST(PlainPagedDecodeTest, ManyShortSequences) {
  std::vector<int> lens;
  for (int i = 0; i < 30; ++i) lens.push_back(1 + i * 7 % 40);
  expect_reference<Kernel<__half, 64, 1, 2, 2>>(ElementType::kFp16, {.lens = lens, .head_dim = 64, .exact_blocks = 1}, 1);
  expect_reference<Kernel<__half, 64, 1, 2, 2>>(ElementType::kFp16, {.lens = lens, .head_dim = 64, .exact_blocks = 0}, 5);
}

TEST(PlainPagedDecodeTest, WritesSixteenBitsRounded) {
  using Kernel = Kernel<__half, 64, 1, 2, 2>;
  const PlainPageLayout layout{ElementType::kFp16, 2, 64, PagedCase::kPageTokens / 16};
  PagedCase test = testing::plain_case({.lens = {130, 20}, .head_dim = 64}, layout, 16);
  const std::vector<float> whole = testing::run_emulated<Kernel>(test, 2);
  for (const ElementType type : {ElementType::kBf16, ElementType::kFp16}) {
    PagedDecode p = test.params({2, Kernel::kThreads / 32});
    std::vector<uint16_t> out(whole.size());
    p.out = out.data();
    p.out_type = type;
    const rotunda::testing::AlignedBytes shared(static_cast<size_t>(Kernel::kSharedBytes), 0xcd);
    emulation::launch(2, static_cast<unsigned>(Kernel::kThreads), [&] { Kernel::run(p, shared.get()); });
    for (size_t i = 0; i < out.size(); ++i)
      ASSERT_EQ(out[i], type == ElementType::kBf16 ? to_bfloat16(whole[i]).bits : to_half(whole[i]).bits) << i;
  }
}

// Windows that begin in a page, between pages, and behind all that is in pages.
TEST(PlainPagedDecodeTest, SlidingWindows) {
  for (const bool masked : {false, true}) {
    expect_reference<Kernel<__half, 64, 1, 2, 2>>(ElementType::kFp16,
                                                  {.lens = {300, 77, 300, 20, 0},
                                                   .n_q = 3,
                                                   .head_dim = 64,
                                                   .masked = masked,
                                                   .first_tokens = {139, 0, 128, 35, 7}},
                                                  3);
  }
}
// More warps than units, and sequences that have nothing in pages.
TEST(PlainPagedDecodeTest, FewUnits) {
  expect_reference<Kernel<__half, 64, 1, 2, 2>>(ElementType::kFp16, {.lens = {20, 0, 0}, .n_q = 3, .head_dim = 64, .slots = false}, 9);
}

}  // namespace
}  // namespace rotunda::kernels
