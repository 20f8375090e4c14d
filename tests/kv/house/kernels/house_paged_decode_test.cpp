// The GPU's decode attention over rotunda2/3/4 pages, its kernel run on the CPU by an emulation of warps (tests/cuda_emulation).

#include <gtest/gtest.h>

#include "kernels/attention/plain_block.cuh"
#include "kernels/paged_decode_case.h"
#include "kv/house/kernels/house_codec_ref.h"
#include "kv/house/kernels/house_page_codec.cuh"

namespace rotunda::kv::house {
namespace {

using kernels::testing::PagedCase;

template <int kKeyBits, int kValueBits, int kHeadDim, int kSets, int kWarps, int kStages>
using Kernel = kernels::PagedDecodeKernel<HousePageCodec<kKeyBits, kValueBits, kHeadDim, kSets>,
                                          kernels::PlainBlock<__half, kHeadDim, kSets, false, PagedCase::kPageTokens>, kHeadDim, kSets,
                                          kWarps, kStages, PagedCase::kPageTokens>;

// Any codes, scales as trained models have them. Queries enter with 13 bits and a sign, weights with 14 bits (12 in every other group of
// four tokens) of the page's largest: rounding adds up to a few 1e-4 of the outputs, which are sums of random signs.
template <int kKeyBits, int kValueBits, int kHeadDim, int kSets, int kWarps, int kStages>
void expect_reference(PagedCase::Shape shape, int blocks) {
  shape.head_dim = kHeadDim;
  const HousePageLayout layout{kKeyBits, kValueBits, shape.n_kv_heads, kHeadDim, PagedCase::kPageTokens / 16};
  PagedCase test(shape, layout.page_bytes(), PagedCase::kPageTokens, 12, [&](std::byte* page, std::mt19937& random) {
    for (int64_t i = 0; i < layout.page_bytes(); ++i) page[i] = static_cast<std::byte>(random());
    std::uniform_real_distribution<float> scale(0.2F, 1.0F);
    for (int head = 0; head < layout.n_kv_heads; ++head) {
      for (int64_t i = 0; i < 2 * layout.page_tokens(); ++i) {
        const Half x = to_half(scale(random));
        std::memcpy(page + layout.key_scale_offset(head) + 2 * i, &x, 2);
      }
    }
  });
  HouseLayer layer;
  layer.layout = layout;
  const auto expected = test.expected([&](const kernels::PageRun& run, int head, const float* q, const kernels::SoftmaxState& state) {
    house_decode_ref({&layer, run, head, shape.n_q, q, ShiftTerm(), state});
  });
  using Tested = Kernel<kKeyBits, kValueBits, kHeadDim, kSets, kWarps, kStages>;
  EXPECT_LT(PagedCase::relative_error(kernels::testing::run_emulated<Tested>(test, blocks), expected), 1e-3);
}

TEST(HousePagedDecodeTest, TwoBits) { expect_reference<2, 2, 128, 1, 4, 2>({.lens = {300, 1000, 128, 5}, .exact_blocks = 2}, 3); }
TEST(HousePagedDecodeTest, Masked) { expect_reference<2, 2, 128, 1, 2, 3>({.lens = {300, 700}, .exact_blocks = 6, .masked = true}, 2); }
TEST(HousePagedDecodeTest, OneHeadNothingExact) {
  expect_reference<2, 2, 128, 1, 2, 2>({.lens = {1, 257, 2, 640}, .n_kv_heads = 3, .n_q = 1, .exact_blocks = 0}, 3);
}
TEST(HousePagedDecodeTest, SevenHeads) { expect_reference<2, 2, 128, 2, 2, 2>({.lens = {513}, .n_kv_heads = 1, .n_q = 7, .masked = true}, 2); }
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

}  // namespace
}  // namespace rotunda::kv::house
