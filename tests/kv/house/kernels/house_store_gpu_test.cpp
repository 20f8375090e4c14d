// Packing tokens on a GPU: the bytes of the reference.

#include <gtest/gtest.h>

#include "kernels/run_on_gpu.h"
#include "kv/house/kernels/house_store_case.h"
#include "kv/house/kernels/house_store_cuda.h"

namespace rotunda::kv::house {
namespace {

using kernels::testing::check_cuda;
using kernels::testing::OnGpu;
using testing::StoreCase;

class HouseStoreGpuTest : public ::testing::Test {
 protected:
  void SetUp() override { ROTUNDA_SKIP_WITHOUT_GPU(); }

  /// Stores on the GPU and brings the pool and the flag back.
  void store(StoreCase& test) {
    HouseStoreBatch p = test.params();
    const OnGpu pool(test.pool.get(), test.pool.size()), feedback(test.feedback.get(), test.feedback.size());
    const OnGpu key(test.key), value(test.value), pairs(test.pairs), refused(test.refused);
    p.pool = pool.as<std::byte>();
    if (p.feedback != nullptr) p.feedback = feedback.as<float>();
    p.key = key.as<float>();
    p.value = value.as<float>();
    p.pairs = pairs.as<StorePair>();
    p.refused = refused.as<int32_t>();
    check_cuda(house_store_cuda(p, nullptr), "house_store_cuda");
    check_cuda(cudaMemcpy(test.pool.get(), p.pool, test.pool.size(), cudaMemcpyDeviceToHost), "kernel");
    check_cuda(cudaMemcpy(test.refused.data(), p.refused, 4 * test.refused.size(), cudaMemcpyDeviceToHost), "kernel");
  }

  void expect_same_bytes(int key_bits, int value_bits, int head_dim, bool feedback, bool few) {
    SCOPED_TRACE(::testing::Message() << key_bits << " " << value_bits << " " << head_dim << " " << feedback << " " << few);
    StoreCase test(key_bits, value_bits, head_dim, feedback, ScaleRule::kUnbiased, 33);
    test.few = few;
    StoreCase::AlignedBytes expected;
    ASSERT_TRUE(test.expected(expected));
    store(test);
    EXPECT_EQ(test.refused, std::vector<int32_t>({0, 0}));
    EXPECT_EQ(std::memcmp(test.pool.get(), expected.get(), expected.size()), 0);
  }
};

TEST_F(HouseStoreGpuTest, BytesOfTheReference) {
  for (int key_bits = 2; key_bits <= 4; ++key_bits)
    for (int value_bits = 2; value_bits <= 4; ++value_bits)
      for (const int head_dim : {32, 64, 96, 128, 256})
        for (const bool feedback : {false, true})
          for (const bool few : {false, true}) expect_same_bytes(key_bits, value_bits, head_dim, feedback, few);
}
TEST_F(HouseStoreGpuTest, FewTokens) {
  for (const bool feedback : {false, true})
    for (const bool few : {false, true}) expect_same_bytes(3, 2, 64, feedback, few);
}

TEST_F(HouseStoreGpuTest, SaysWhatItRefuses) {
  StoreCase test(2, 2, 128, true, ScaleRule::kUnbiased, 34);
  test.key[20 * test.row_stride + 70] = std::numeric_limits<float>::quiet_NaN();
  store(test);
  EXPECT_EQ(test.refused, std::vector<int32_t>({1, 0}));
}

}  // namespace
}  // namespace rotunda::kv::house
