// Unpacking pages on a GPU against the reference.

#include <gtest/gtest.h>

#include "kernels/run_on_gpu.h"
#include "kv/house/kernels/house_load_case.h"
#include "kv/house/kernels/house_load_cuda.h"

namespace rotunda::kv::house {
namespace {

using kernels::testing::check_cuda;
using kernels::testing::OnGpu;

class HouseLoadGpuTest : public ::testing::Test {
 protected:
  void SetUp() override { ROTUNDA_SKIP_WITHOUT_GPU(); }
};

TEST_F(HouseLoadGpuTest, ElementsOfTheReferenceFewPages) {
  testing::for_each_load_case([](int key_bits, int value_bits, int head_dim, kernels::ElementType type) {
    SCOPED_TRACE(::testing::Message() << key_bits << " " << value_bits << " " << head_dim << " " << static_cast<int>(type));
    testing::LoadCase test(key_bits, value_bits, head_dim, type);
    HouseLoadPages p = test.params();
    const OnGpu pool(test.pool.get(), test.pool.size()), table(test.table);
    const OnGpu key(test.key.get(), test.key.size()), value(test.value.get(), test.value.size());
    p.pool = pool.as<std::byte>();
    p.table = table.as<int32_t>();
    p.key = key.as<std::byte>();
    p.value = value.as<std::byte>();
    check_cuda(house_load_cuda(p, nullptr), "house_load_cuda");
    check_cuda(cudaMemcpy(test.key.get(), p.key, test.key.size(), cudaMemcpyDeviceToHost), "kernel");
    check_cuda(cudaMemcpy(test.value.get(), p.value, test.value.size(), cudaMemcpyDeviceToHost), "kernel");
    EXPECT_EQ(test.n_wrong(), 0);
  });
}

TEST_F(HouseLoadGpuTest, Refuses) {
  EXPECT_EQ(house_load_cuda({.layout = {5, 2, 1, 64, 8}, .n_pages = 1}, nullptr), cudaErrorInvalidValue);
  EXPECT_EQ(house_load_cuda({.layout = {2, 2, 1, 72, 8}, .n_pages = 1}, nullptr), cudaErrorInvalidValue);
}

}  // namespace
}  // namespace rotunda::kv::house
