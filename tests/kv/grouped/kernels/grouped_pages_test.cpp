// A GPU's packing and unpacking of grouped formats: the bytes and the numbers of the CPU. The kernels' bodies run on the CPU by an
// emulation of warps (tests/cuda_emulation).

#include <gtest/gtest.h>

#include "cuda_runtime.h"
#include "kv/grouped/kernels/grouped_load.cuh"
#include "kv/grouped/kernels/grouped_pages_case.h"
#include "kv/grouped/kernels/grouped_store.cuh"

namespace rotunda::kv::grouped {
namespace {

using testing::for_each_way;
using testing::LoadCase;
using testing::StoreCase;

void store(StoreCase& test) {
  const GroupedStoreBatch p = test.params();
  const testing::AlignedBytes shared(static_cast<size_t>(GroupedStoreBlock::shared_bytes(test.layer.layout.head_dim)), 0xcd);
  emulation::launch(static_cast<unsigned>(GroupedStoreBlock::blocks(p)), static_cast<unsigned>(GroupedStoreBlock::threads(p.layer.layout)),
                    [&] { GroupedStoreBlock::run(p, shared.get()); });
}

TEST(GroupedStoreBlockTest, BytesOfTheCpu) {
  for (const int head_dim : {48, 128}) {
    for_each_way(1, head_dim, [](const GroupedLayer& layer) {
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

// Codes of a token that was refused are as they were: nothing that decode could read as NaN.
TEST(GroupedStoreBlockTest, SaysWhatItRefusesAndLeavesItsCodes) {
  StoreCase test(testing::layer_of(testing::way("fp8"), testing::way("fp8"), 1, 64, 8));
  const GroupedPageLayout& l = test.layer.layout;
  const std::byte* const page = test.pool.get() + 3 * test.layer_bytes;  // layer 1 of page 1
  const std::vector<std::byte> before(page, page + l.page_bytes());
  bool taken = false;
  const testing::AlignedBytes expected = test.expected(&taken);
  test.key[static_cast<size_t>((StoreCase::kRows + 20) * test.row_stride + 7)] = std::numeric_limits<float>::quiet_NaN();
  store(test);
  EXPECT_EQ(test.refused, std::vector<int32_t>({0, 1}));
  for (int t = 0; t < 32; ++t) {
    const std::byte* const same = t == 20 ? before.data() : expected.get() + 3 * test.layer_bytes;
    for (int c = 0; c < 64; ++c) ASSERT_EQ(read_code(l, page, true, 0, t, c), read_code(l, same, true, 0, t, c)) << t << " " << c;
  }
}

template <typename T>
void expect_loaded(const GroupedLayer& layer, kernels::ElementType type) {
  LoadCase test(layer, type);
  const GroupedLoadPages p = test.params();
  emulation::launch(static_cast<unsigned>(2 * p.n_pages * layer.layout.n_kv_heads), GroupedLoadBlock<T>::kThreads,
                    [&] { GroupedLoadBlock<T>::run(p); });
  EXPECT_EQ(test.n_wrong(), 0);
}

TEST(GroupedLoadBlockTest, ElementsOfTheCpu) {
  for_each_way(2, 48, [](const GroupedLayer& layer) { expect_loaded<float>(layer, kernels::ElementType::kFp32); }, 8);
  for_each_way(1, 64, [](const GroupedLayer& layer) { expect_loaded<__half>(layer, kernels::ElementType::kFp16); }, 8);
}
TEST(GroupedLoadBlockTest, Bf16) {
  expect_loaded<__nv_bfloat16>(testing::layer_of(testing::way("fp8"), testing::way("fp8"), 1, 128, 8), kernels::ElementType::kBf16);
}

}  // namespace
}  // namespace rotunda::kv::grouped
