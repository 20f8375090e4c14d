// The GPU's unpacking of pages, its kernel run on the CPU by an emulation of warps (tests/cuda_emulation), against the reference.

#include <gtest/gtest.h>

#include "cuda_runtime.h"
#include "kv/house/kernels/house_load.cuh"
#include "kv/house/kernels/house_load_case.h"

namespace rotunda::kv::house {
namespace {

template <typename T>
void load_emulated(const HouseLoadPages& p) {
  emulation::launch(static_cast<unsigned>(2 * p.n_pages * p.layout.n_kv_heads),
                    static_cast<unsigned>(HouseLoadBlock<T>::threads(p.layout.head_dim)), [&] { HouseLoadBlock<T>::run(p); });
}

TEST(HouseLoadBlockTest, ElementsOfTheReference) {
  testing::for_each_load_case([](int key_bits, int value_bits, int head_dim, kernels::ElementType type) {
    SCOPED_TRACE(::testing::Message() << key_bits << " " << value_bits << " " << head_dim << " " << static_cast<int>(type));
    testing::LoadCase test(key_bits, value_bits, head_dim, type);
    if (type == kernels::ElementType::kFp32) load_emulated<float>(test.params());
    else if (type == kernels::ElementType::kBf16) load_emulated<__nv_bfloat16>(test.params());
    else load_emulated<__half>(test.params());
    EXPECT_EQ(test.n_wrong(), 0);
  });
}

}  // namespace
}  // namespace rotunda::kv::house
