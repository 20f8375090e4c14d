// Packing and unpacking of grouped formats on a GPU: the bytes and the numbers of the CPU.

#include <gtest/gtest.h>

#include "kernels/run_on_gpu.h"
#include "kv/grouped/kernels/grouped_pages_case.h"
#include "kv/grouped/kernels/grouped_pages_cuda.h"

namespace rotunda::kv::grouped {
namespace {

using kernels::testing::check_cuda;
using kernels::testing::OnGpu;
using testing::for_each_way;
using testing::LoadCase;
using testing::StoreCase;

class GroupedPagesGpuTest : public ::testing::Test {
 protected:
  void SetUp() override { ROTUNDA_SKIP_WITHOUT_GPU(); }

  /// Stores on the GPU and brings the pool and the flags back.
  static void store(StoreCase& test) {
    GroupedStoreBatch p = test.params();
    const OnGpu pool(test.pool.get(), test.pool.size()), key(test.key), value(test.value), pairs(test.pairs), refused(test.refused);
    p.pool = pool.as<std::byte>();
    p.key = key.as<float>();
    p.value = value.as<float>();
    p.pairs = pairs.as<StorePair>();
    p.refused = refused.as<int32_t>();
    check_cuda(grouped_store_cuda(p, nullptr), "grouped_store_cuda");
    check_cuda(cudaMemcpy(test.pool.get(), p.pool, test.pool.size(), cudaMemcpyDeviceToHost), "kernel");
    check_cuda(cudaMemcpy(test.refused.data(), p.refused, 4 * test.refused.size(), cudaMemcpyDeviceToHost), "kernel");
  }
};

TEST_F(GroupedPagesGpuTest, BytesOfTheCpu) {
  for (const int head_dim : {16, 48, 64, 128, 256}) {
    for_each_way(2, head_dim, [](const GroupedLayer& layer) {
      StoreCase test(layer);
      bool taken = false;
      const testing::AlignedBytes expected = test.expected(&taken);
      ASSERT_TRUE(taken);
      store(test);
      EXPECT_EQ(test.refused, std::vector<int32_t>({0, 0}));
      EXPECT_EQ(std::memcmp(test.pool.get(), expected.get(), expected.size()), 0);
    }, 8);
  }
}

TEST_F(GroupedPagesGpuTest, SaysWhatItRefuses) {
  for_each_way(2, 64, [](const GroupedLayer& layer) {
    StoreCase test(layer);
    test.key[static_cast<size_t>((StoreCase::kRows + 20) * test.row_stride + 70)] = std::numeric_limits<float>::quiet_NaN();
    store(test);
    EXPECT_EQ(test.refused, std::vector<int32_t>({0, 1}));
  }, 8);
}

TEST_F(GroupedPagesGpuTest, ElementsOfTheCpu) {
  for (const int head_dim : {16, 48, 128}) {
    for (const auto type : {kernels::ElementType::kFp32, kernels::ElementType::kBf16, kernels::ElementType::kFp16}) {
      for_each_way(2, head_dim, [&](const GroupedLayer& layer) {
        LoadCase test(layer, type);
        GroupedLoadPages p = test.params();
        const OnGpu pool(test.pool.get(), test.pool.size()), table(test.table);
        const OnGpu key(test.key.get(), test.key.size()), value(test.value.get(), test.value.size());
        p.pool = pool.as<std::byte>();
        p.table = table.as<int32_t>();
        p.key = key.as<std::byte>();
        p.value = value.as<std::byte>();
        check_cuda(grouped_load_cuda(p, nullptr), "grouped_load_cuda");
        check_cuda(cudaMemcpy(test.key.get(), p.key, test.key.size(), cudaMemcpyDeviceToHost), "kernel");
        check_cuda(cudaMemcpy(test.value.get(), p.value, test.value.size(), cudaMemcpyDeviceToHost), "kernel");
        EXPECT_EQ(test.n_wrong(), 0);
      }, 8);
    }
  }
}

TEST_F(GroupedPagesGpuTest, Refuses) {
  GroupedStoreBatch store_params;
  store_params.layer.layout.head_dim = 2048;
  EXPECT_EQ(grouped_store_cuda(store_params, nullptr), cudaErrorInvalidValue);
  GroupedLoadPages load_params;
  load_params.layer.layout.head_dim = 72;
  EXPECT_EQ(grouped_load_cuda(load_params, nullptr), cudaErrorInvalidValue);
}

}  // namespace
}  // namespace rotunda::kv::grouped
