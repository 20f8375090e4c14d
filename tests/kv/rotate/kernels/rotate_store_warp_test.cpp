// The GPU's packing of tokens, its kernel run on the CPU by an emulation of warps (tests/cuda_emulation): the bytes of the reference.

#include <gtest/gtest.h>

#include "cuda_runtime.h"
#include "kv/rotate/kernels/rotate_store.cuh"
#include "kv/rotate/kernels/rotate_store_case.h"

namespace rotunda::kv::rotate {
namespace {

using testing::StoreCase;

void store_emulated(StoreCase& test) {
  constexpr int kWarps = 4;
  const RotateStoreBatch p = test.params();
  const rotunda::testing::AlignedBytes shared(static_cast<size_t>(kWarps * RotateStoreWarp::shared_bytes(p.layout)), 0xcd);
  const auto blocks = static_cast<unsigned>((rotate_store_items(p) + kWarps - 1) / kWarps);
  emulation::launch(blocks, kWarps * 32, [&] { rotate_store_warps(p, kWarps, shared.get()); });
}

TEST(RotateStoreWarpTest, BytesOfTheReference) {
  // Fibers are slow: a third of the layouts, all numbers of bits, zero points and shapes among them.
  testing::for_each_layout([](const RotatePageLayout& layout) {
    SCOPED_TRACE(::testing::Message() << layout.bits << " " << static_cast<int>(layout.zero) << " " << layout.n_kv_heads << " x "
                                      << layout.head_dim);
    StoreCase test(layout, 31);
    StoreCase::AlignedBytes expected;
    ASSERT_EQ(test.expected(expected), std::vector<bool>(StoreCase::kLayers, true));
    store_emulated(test);
    EXPECT_EQ(test.refused, std::vector<int32_t>(StoreCase::kLayers, 0));
    EXPECT_EQ(std::memcmp(test.pool.get(), expected.get(), expected.size()), 0);
  }, 3);
}

TEST(RotateStoreWarpTest, RefusesWhatTheReferenceRefuses) {
  for (const float bad : testing::kBad) {
    for (const bool of_key : {true, false}) {
      for (const ZeroPoint zero : {ZeroPoint::kCode, ZeroPoint::kMinimum}) {
        StoreCase test({2, zero, 2, 64, 2, 32, 8}, 32);
        (of_key ? test.key : test.value)[test.layer_stride() + 20 * test.row_stride() + 70] = bad;
        test.pairs.resize(1);
        StoreCase::AlignedBytes expected;
        const std::vector<bool> taken = test.expected(expected);
        ASSERT_TRUE(taken[0]);
        store_emulated(test);
        EXPECT_EQ(test.refused, (std::vector<int32_t>{0, taken[1] ? 0 : 1})) << bad << " " << of_key;
      }
    }
  }
}

}  // namespace
}  // namespace rotunda::kv::rotate
