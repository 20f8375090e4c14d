// The GPU's decode attention over fp8 pages, its kernel run on the CPU by an emulation of warps (tests/cuda_emulation).

#include <gtest/gtest.h>

#include "kernels/attention/plain_block.cuh"
#include "kernels/run_emulated.h"
#include "kv/grouped/kernels/fp8_page_codec.cuh"
#include "kv/grouped/kernels/fp8_paged_case.h"

namespace rotunda::kv::grouped {
namespace {

using kernels::testing::PagedCase;

template <int kHeadDim, int kSets, int kWarps, int kStages>
void expect_reference(PagedCase::Shape shape, int blocks) {
  using Kernel = kernels::PagedDecodeKernel<Fp8PageCodec<kHeadDim, kSets>,
                                            kernels::PlainBlock<__half, kHeadDim, kSets, false, PagedCase::kPageTokens>, kHeadDim, kSets, kWarps,
                                            kStages, PagedCase::kPageTokens>;
  shape.head_dim = kHeadDim;
  const GroupedLayer layer = testing::fp8_layer(shape.n_kv_heads, kHeadDim);
  PagedCase test = testing::fp8_case(shape, layer);
  const auto out = kernels::testing::run_emulated<Kernel>(test, blocks);
  // Codes are exact, queries and weights have 22 bits, sums are in fp32.
  EXPECT_LT(PagedCase::relative_error(out, testing::fp8_expected(test, layer)), 4e-6);
}

TEST(Fp8PagedDecodeTest, Ragged) { expect_reference<128, 1, 4, 3>({.lens = {300, 1000, 128, 5}, .exact_blocks = 2}, 3); }
TEST(Fp8PagedDecodeTest, Masked) { expect_reference<128, 1, 2, 2>({.lens = {300, 700}, .exact_blocks = 6, .masked = true}, 2); }
TEST(Fp8PagedDecodeTest, SlidingWindows) {
  for (const bool masked : {false, true}) {
    expect_reference<64, 1, 2, 3>({.lens = {600, 77, 300, 20, 0}, .masked = masked, .first_tokens = {143, 0, 256, 35, 7}}, 3);
  }
}
TEST(Fp8PagedDecodeTest, OneHeadNothingExact) {
  expect_reference<128, 1, 2, 3>({.lens = {1, 257, 2, 640}, .n_kv_heads = 3, .n_q = 1, .exact_blocks = 0}, 3);
}
TEST(Fp8PagedDecodeTest, UpToEightHeads) {
  expect_reference<128, 2, 2, 2>({.lens = {513}, .n_kv_heads = 1, .n_q = 7, .masked = true}, 2);
  expect_reference<64, 2, 2, 2>({.lens = {200}, .n_q = 8}, 3);
}
TEST(Fp8PagedDecodeTest, NarrowAndWideHeads) {
  expect_reference<64, 1, 2, 2>({.lens = {300, 0}, .n_q = 2}, 3);
  expect_reference<256, 1, 2, 2>({.lens = {300}, .n_q = 2}, 3);
  expect_reference<256, 2, 2, 3>({.lens = {140}, .n_kv_heads = 1, .n_q = 6}, 2);
}

// Every code as the tensor cores get it.
TEST(Fp8PagedDecodeTest, CodesBecomeHalves) {
  using kernels::HalvesOfE4m3;
  for (uint32_t code = 0; code < 256; ++code) {
    if ((code & 0x7f) == 0x7f) continue;
    const uint32_t others[3] = {(code + 77) & 0x7e, (code + 130) & 0xfe, (code * 3) & 0xfe};
    uint32_t low = 0;
    uint32_t high = 0;
    HalvesOfE4m3::split(code | others[0] << 8 | others[1] << 16 | others[2] << 24, low, high);
    const auto number = [](uint32_t bits) { return double{to_float(Half{static_cast<uint16_t>(bits)})} * HalvesOfE4m3::kUnit; };
    EXPECT_EQ(number(low), E4m3::decode(code));
    EXPECT_EQ(number(low >> 16), E4m3::decode(others[0]));
    EXPECT_EQ(number(high), E4m3::decode(others[1]));
    EXPECT_EQ(number(high >> 16), E4m3::decode(others[2]));
  }
}

}  // namespace
}  // namespace rotunda::kv::grouped
