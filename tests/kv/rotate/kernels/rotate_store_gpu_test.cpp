// Packing tokens on a GPU: the bytes of the reference.

#include <gtest/gtest.h>

#include "kernels/run_on_gpu.h"
#include "kv/rotate/kernels/rotate_store_case.h"
#include "kv/rotate/kernels/rotate_store_cuda.h"

namespace rotunda::kv::rotate {
namespace {

using kernels::testing::check_cuda;
using kernels::testing::OnGpu;
using testing::StoreCase;

class RotateStoreGpuTest : public ::testing::Test {
 protected:
  void SetUp() override { ROTUNDA_SKIP_WITHOUT_GPU(); }

  /// Stores on the GPU and brings the pool and the flags back.
  void store(StoreCase& test) {
    RotateStoreBatch p = test.params();
    const OnGpu pool(test.pool.get(), test.pool.size()), key_group(test.key_group), key_order(test.key_order);
    const OnGpu key(test.key), value(test.value), pairs(test.pairs), refused(test.refused);
    p.pool = pool.as<std::byte>();
    p.key_group = key_group.as<uint16_t>();
    p.key_order = key_order.as<uint16_t>();
    p.key = key.as<float>();
    p.value = value.as<float>();
    p.pairs = pairs.as<StorePair>();
    p.refused = refused.as<int32_t>();
    check_cuda(rotate_store_cuda(p, nullptr), "rotate_store_cuda");
    check_cuda(cudaMemcpy(test.pool.get(), p.pool, test.pool.size(), cudaMemcpyDeviceToHost), "kernel");
    check_cuda(cudaMemcpy(test.refused.data(), p.refused, test.refused.size() * 4, cudaMemcpyDeviceToHost), "kernel");
  }
};

TEST_F(RotateStoreGpuTest, BytesOfTheReference) {
  testing::for_each_layout([&](const RotatePageLayout& layout) {
    SCOPED_TRACE(::testing::Message() << layout.bits << " " << static_cast<int>(layout.zero) << " " << layout.n_kv_heads << " x "
                                      << layout.head_dim);
    StoreCase test(layout, 33);
    StoreCase::AlignedBytes expected;
    ASSERT_EQ(test.expected(expected), std::vector<bool>(StoreCase::kLayers, true));
    store(test);
    EXPECT_EQ(test.refused, std::vector<int32_t>(StoreCase::kLayers, 0));
    EXPECT_EQ(std::memcmp(test.pool.get(), expected.get(), expected.size()), 0);
  });
}

TEST_F(RotateStoreGpuTest, SaysWhatItRefuses) {
  for (const float bad : testing::kBad) {
    StoreCase test({2, ZeroPoint::kMinimum, 2, 64, 2, 32, 8}, 34);
    test.value[test.layer_stride() + 20 * test.row_stride() + 70] = bad;
    StoreCase::AlignedBytes expected;
    const std::vector<bool> taken = test.expected(expected);
    store(test);
    EXPECT_EQ(test.refused, (std::vector<int32_t>{0, taken[1] ? 0 : 1})) << bad;
  }
}

}  // namespace
}  // namespace rotunda::kv::rotate
