// The GPU's packing of tokens, its kernel run on the CPU by an emulation of warps (tests/cuda_emulation): the bytes of the reference.

#include <gtest/gtest.h>

#include "cuda_runtime.h"
#include "kv/house/kernels/house_store.cuh"
#include "kv/house/kernels/house_store_case.h"

namespace rotunda::kv::house {
namespace {

using testing::StoreCase;

void store_emulated(StoreCase& test) {
  constexpr int kWarps = 3;
  const HouseStoreBatch p = test.params();
  const rotunda::testing::AlignedBytes shared(static_cast<size_t>(kWarps * HouseStoreWarp::shared_bytes(p.layout.head_dim)), 0xcd);
  const unsigned items = static_cast<unsigned>(2 * p.n_layers * p.layout.n_kv_heads * p.n_pairs);
  emulation::launch((items + kWarps - 1) / kWarps, kWarps * 32, [&] { house_store_warps(p, kWarps, shared.get()); });
}

void expect_same_bytes(int key_bits, int value_bits, int head_dim, bool feedback, ScaleRule scale = ScaleRule::kUnbiased) {
  SCOPED_TRACE(::testing::Message() << key_bits << " " << value_bits << " " << head_dim << " " << feedback);
  StoreCase test(key_bits, value_bits, head_dim, feedback, scale, 31);
  StoreCase::AlignedBytes expected;
  ASSERT_TRUE(test.expected(expected));
  store_emulated(test);
  EXPECT_EQ(test.refused, std::vector<int32_t>({0, 0}));
  EXPECT_EQ(std::memcmp(test.pool.get(), expected.get(), expected.size()), 0);
}

TEST(HouseStoreWarpTest, BytesOfTheReference) {
  for (const int bits : {2, 3, 4}) {
    expect_same_bytes(bits, bits, 64, false);
    expect_same_bytes(bits, bits, 64, true);
  }
  expect_same_bytes(2, 4, 96, true);
  expect_same_bytes(4, 2, 32, true, ScaleRule::kLeastSquares);
  expect_same_bytes(2, 2, 128, true);
}

TEST(HouseStoreWarpTest, RefusesWhatTheReferenceRefuses) {
  for (const float bad : {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity(), 1e30F, 1e9F}) {
    for (const bool of_key : {true, false}) {
      StoreCase test(2, 2, 64, true, ScaleRule::kUnbiased, 32);
      (of_key ? test.key : test.value)[20 * test.row_stride + 70] = bad;
      StoreCase::AlignedBytes expected;
      ASSERT_FALSE(test.expected(expected));
      store_emulated(test);
      EXPECT_EQ(test.refused, std::vector<int32_t>({1, 0})) << bad << " " << of_key;
    }
  }
}

}  // namespace
}  // namespace rotunda::kv::house
