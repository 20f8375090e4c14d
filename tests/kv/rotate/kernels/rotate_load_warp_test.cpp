// The GPU's unpacking of pages, its kernel run on the CPU by an emulation of warps (tests/cuda_emulation), against the reference.

#include <gtest/gtest.h>

#include "cuda_runtime.h"
#include "kv/rotate/kernels/rotate_load.cuh"
#include "kv/rotate/kernels/rotate_load_case.h"

namespace rotunda::kv::rotate {
namespace {

using kernels::ElementType;
using testing::LoadCase;

template <typename T>
void expect_reference(const RotatePageLayout& layout, ElementType type) {
  SCOPED_TRACE(::testing::Message() << layout.bits << " " << static_cast<int>(layout.zero) << " " << layout.n_kv_heads << " x "
                                    << layout.head_dim);
  constexpr int kWarps = 4;
  LoadCase test(layout, type, 41);
  const RotateLoadBatch p = test.params();
  const auto blocks = static_cast<unsigned>((rotate_load_items(p) + kWarps - 1) / kWarps);
  emulation::launch(blocks, kWarps * 32, [&] { rotate_load_warps<T>(p, kWarps); });
  EXPECT_EQ(test.wrong(), 0);
}

TEST(RotateLoadWarpTest, ElementsOfTheReference) {
  testing::for_each_layout([](const RotatePageLayout& layout) { expect_reference<float>(layout, ElementType::kFp32); }, 3);
}
TEST(RotateLoadWarpTest, SixteenBits) {
  expect_reference<__nv_bfloat16>({2, ZeroPoint::kMinimum, 2, 64, 2, 64, 8}, ElementType::kBf16);
  expect_reference<__half>({3, ZeroPoint::kCode, 2, 64, 2, 64, 8}, ElementType::kFp16);
}

}  // namespace
}  // namespace rotunda::kv::rotate
