// Unpacking pages on a GPU against the reference.

#include <gtest/gtest.h>

#include "kernels/run_on_gpu.h"
#include "kv/rotate/kernels/rotate_load_case.h"
#include "kv/rotate/kernels/rotate_load_cuda.h"

namespace rotunda::kv::rotate {
namespace {

using kernels::ElementType;
using kernels::testing::check_cuda;
using kernels::testing::OnGpu;
using testing::LoadCase;

class RotateLoadGpuTest : public ::testing::Test {
 protected:
  void SetUp() override { ROTUNDA_SKIP_WITHOUT_GPU(); }
};

TEST_F(RotateLoadGpuTest, ElementsOfTheReference) {
  testing::for_each_layout([](const RotatePageLayout& layout) {
    for (const ElementType type : {ElementType::kFp32, ElementType::kBf16, ElementType::kFp16}) {
      SCOPED_TRACE(::testing::Message() << layout.bits << " " << static_cast<int>(layout.zero) << " " << layout.n_kv_heads << " x "
                                        << layout.head_dim << " as " << static_cast<int>(type));
      LoadCase test(layout, type, 42);
      RotateLoadBatch p = test.params();
      const OnGpu key_group(test.key_group), pool(test.pool.get(), test.pool.size()), table(test.table), key(test.key);
      const OnGpu value(test.value.get(), test.value.size());
      p.key_group = key_group.as<uint16_t>();
      p.pool = pool.as<std::byte>();
      p.table = table.as<int32_t>();
      p.key = key.as<float>();
      p.value = value.as<void>();
      check_cuda(rotate_load_cuda(p, nullptr), "rotate_load_cuda");
      check_cuda(cudaMemcpy(test.key.data(), p.key, test.key.size() * 4, cudaMemcpyDeviceToHost), "kernel");
      check_cuda(cudaMemcpy(test.value.get(), p.value, test.value.size(), cudaMemcpyDeviceToHost), "kernel");
      EXPECT_EQ(test.wrong(), 0);
    }
  });
}

}  // namespace
}  // namespace rotunda::kv::rotate
