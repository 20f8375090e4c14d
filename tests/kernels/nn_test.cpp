// The bodies of the norm's and SwiGLU's kernels, run on the CPU, against the scalar references.

#include "cuda_runtime.h"  // the emulation: before the kernels

#include <gtest/gtest.h>

#include <limits>
#include <type_traits>

#include "kernels/nn/nn.cuh"
#include "kernels/nn_case.h"

namespace rotunda::kernels {
namespace {

template <typename T>
using CudaType = std::conditional_t<std::is_same_v<T, float>, float, std::conditional_t<std::is_same_v<T, Half>, __half, __nv_bfloat16>>;

template <typename T, int kSize, int kThreads>
double emulated_norm_error(int64_t n_rows, int64_t row_size) {
  return testing::rms_norm_error<T>(n_rows, row_size, [](RmsNorm p, testing::NormRows<T>& rows) {
    p.y = rows.y.data();
    if (p.sum != nullptr) p.sum = rows.sum.data();
    std::vector<float> shared(kThreads / 32, std::numeric_limits<float>::quiet_NaN());
    emulation::launch(static_cast<unsigned>(p.n_rows), kThreads,
                      [&] { RmsNormBlock<CudaType<T>, kSize, kThreads>::run(p, shared.data()); });
  });
}

// fp32 sums of up to 2,000 squares stand within 1e-6 of the fp64 sum: in 16 bits that can turn a rounding, each of the two by one step.
TEST(RmsNormTest, EveryTypeAndShape) {
  EXPECT_LE((emulated_norm_error<BFloat16, 8, 64>(3, 256)), 2.0);
  EXPECT_LE((emulated_norm_error<BFloat16, 8, 32>(5, 128)), 2.0);
  EXPECT_LE((emulated_norm_error<BFloat16, 1, 64>(2, 81)), 2.0);
  EXPECT_LE((emulated_norm_error<Half, 8, 256>(2, 2048 + 8)), 2.0);
  EXPECT_LE((emulated_norm_error<Half, 1, 32>(1, 7)), 2.0);
  EXPECT_LE((emulated_norm_error<float, 4, 128>(2, 1000)), 16.0);
  EXPECT_LE((emulated_norm_error<float, 1, 32>(2, 33)), 16.0);
}

TEST(RmsNormTest, NanSpreadsOverItsRowAlone) {
  std::vector<float> x(2 * 64, 1.0F);
  x[70] = std::numeric_limits<float>::quiet_NaN();
  const std::vector<float> weight(64, 2.0F);
  std::vector<float> y(x.size());
  const RmsNorm p{.x = x.data(), .weight = weight.data(), .y = y.data(), .n_rows = 2, .row_size = 64};
  emulation::launch(2, 32, [&] { RmsNormBlock<float, 4, 32>::run(p, nullptr); });
  for (size_t i = 0; i < 64; ++i) {
    EXPECT_EQ(y[i], 2.0F);
    EXPECT_TRUE(std::isnan(y[64 + i]));
  }
}

template <typename T, int kSize, int kThreads>
double emulated_swiglu_error(int64_t n_rows, int64_t row_size) {
  return testing::swiglu_error<T>(n_rows, row_size, [](Swiglu p, const auto&, std::vector<T>& y) {
    p.y = y.data();
    const auto blocks = static_cast<unsigned>((p.n_rows * (p.row_size / kSize) + kThreads - 1) / kThreads);
    emulation::launch(blocks, kThreads, [&] { SwigluBlock<CudaType<T>, kSize, kThreads>::run(p); });
  });
}

TEST(SwigluTest, EveryTypeAndShape) {
  EXPECT_LE((emulated_swiglu_error<BFloat16, 8, 32>(3, 264)), 2.0);
  EXPECT_LE((emulated_swiglu_error<BFloat16, 1, 32>(3, 11)), 2.0);
  EXPECT_LE((emulated_swiglu_error<Half, 8, 64>(1, 1024)), 2.0);
  EXPECT_LE((emulated_swiglu_error<float, 4, 32>(5, 40)), 16.0);
  EXPECT_LE((emulated_swiglu_error<float, 1, 32>(1, 1)), 16.0);
}

}  // namespace
}  // namespace rotunda::kernels
