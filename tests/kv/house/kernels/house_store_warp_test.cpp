// The GPU's packing of tokens, its kernel run on the CPU by an emulation of warps (tests/cuda_emulation): the bytes of the reference.

#include <gtest/gtest.h>

#include "cuda_runtime.h"
#include "kv/house/kernels/house_store.cuh"
#include "kv/house/kernels/house_store_case.h"

namespace rotunda::kv::house {
namespace {

using testing::StoreCase;

template <int kTokens, int kTries, bool kFeedback>
void launch_emulated(const HouseStoreBatch& p, bool keys, bool values) {
  const HouseStoreGrid grid{keys, values, 2, 2};
  constexpr int kPairs = HouseStoreWarp<kTokens, kTries, kFeedback>::kPairs;
  const rotunda::testing::AlignedBytes shared(
      static_cast<size_t>(house_store_shared_bytes<kTokens, kTries, kFeedback>(p.layout.head_dim, grid.warps)), 0xcd);
  const int64_t blocks = HouseStoreGrid::blocks_of_head((p.n_pairs + kPairs - 1) / kPairs, grid.warps, grid.items_per_warp);
  emulation::launch(static_cast<unsigned>((keys && values ? 2 : 1) * p.n_layers * p.layout.n_kv_heads * blocks),
                    static_cast<unsigned>(grid.warps) * 32, [&] { house_store_block<kTokens, kTries, kFeedback>(p, grid, shared.get()); });
}

/// @tparam kTokens 32 or 4: the kernel for many, or for few
template <int kTokens, int kTries>
void store_emulated(StoreCase& test) {
  const HouseStoreBatch p = test.params();
  if (p.feedback == nullptr) return launch_emulated<kTokens, 1, false>(p, true, true);
  launch_emulated<kTokens, kTries, true>(p, true, false);
  launch_emulated<kTokens, 1, false>(p, false, true);
}

template <int kTokens, int kTries>
void expect_same_bytes(int key_bits, int value_bits, int head_dim, bool feedback, ScaleRule scale = ScaleRule::kUnbiased) {
  SCOPED_TRACE(::testing::Message() << key_bits << " " << value_bits << " " << head_dim << " " << feedback);
  StoreCase test(key_bits, value_bits, head_dim, feedback, scale, 31);
  StoreCase::AlignedBytes expected;
  ASSERT_TRUE(test.expected(expected));
  store_emulated<kTokens, kTries>(test);
  EXPECT_EQ(test.refused, std::vector<int32_t>({0, 0}));
  EXPECT_EQ(std::memcmp(test.pool.get(), expected.get(), expected.size()), 0);
}

template <int kTokens, int kTries>
void expect_reference() {
  for (const int bits : {2, 3, 4}) {
    expect_same_bytes<kTokens, kTries>(bits, bits, 64, false);
    expect_same_bytes<kTokens, kTries>(bits, bits, 64, true);
  }
  expect_same_bytes<kTokens, kTries>(2, 4, 96, true);
  expect_same_bytes<kTokens, kTries>(4, 2, 32, true, ScaleRule::kLeastSquares);
  expect_same_bytes<kTokens, kTries>(2, 2, 128, true);
}
TEST(HouseStoreWarpTest, ManyTokens) { expect_reference<32, 1>(); }
TEST(HouseStoreWarpTest, ManyTokensTwoTriesAtOnce) { expect_reference<32, 2>(); }
TEST(HouseStoreWarpTest, FewTokens) { expect_reference<4, 1>(); }

TEST(HouseStoreWarpTest, RefusesWhatTheReferenceRefuses) {
  for (const float bad : {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity(), 1e30F, 1e9F}) {
    for (const bool of_key : {true, false}) {
      StoreCase test(2, 2, 64, true, ScaleRule::kUnbiased, 32);
      (of_key ? test.key : test.value)[20 * test.row_stride + 70] = bad;
      StoreCase::AlignedBytes expected;
      ASSERT_FALSE(test.expected(expected));
      store_emulated<32, 1>(test);
      EXPECT_EQ(test.refused, std::vector<int32_t>({1, 0})) << bad << " " << of_key;
      test.refused = {0, 0};
      store_emulated<4, 1>(test);
      EXPECT_EQ(test.refused, std::vector<int32_t>({1, 0})) << bad << " " << of_key << ", few";
    }
  }
}

}  // namespace
}  // namespace rotunda::kv::house
