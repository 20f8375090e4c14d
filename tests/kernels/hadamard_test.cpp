#include "kernels/hadamard/hadamard.h"

#include <gtest/gtest.h>

#include <cmath>
#include <random>
#include <vector>

#include "kernels/aligned.h"
#include "kernels/each_target.h"
#include "kernels/hadamard/hadamard_ref.h"

namespace rotunda::kernels {
namespace {

using testing::AlignedBytes;
using testing::for_each_target;

const int kSizes[] = {1,   2,   4,   8,   12,  16,  20,  24,  28,  32,  40,  48,  56,  64,  80,  96,   112, 128, 144,
                      160, 192, 224, 240, 256, 320, 384, 448, 512, 576, 640, 768, 896, 960, 1024};

TEST(Hadamard, PlanCoversEverySize) {
  for (int n = 1; n <= 2048; ++n) {
    const HadamardPlan plan = hadamard_plan(n);
    EXPECT_EQ(plan.n, n);
    EXPECT_EQ(plan.blocks * plan.m * plan.pow2, n);
    EXPECT_TRUE(plan.m == 1 || plan.m == 12 || plan.m == 20 || plan.m == 28) << n;
  }
  EXPECT_EQ(hadamard_plan(512).pow2, 512);
  EXPECT_EQ(hadamard_plan(320).m, 20);
  EXPECT_EQ(hadamard_plan(384).m, 12);
  EXPECT_EQ(hadamard_plan(448).m, 28);
  EXPECT_EQ(hadamard_plan(112).pow2, 4);
  EXPECT_EQ(hadamard_plan(144).blocks, 9);
}

TEST(Hadamard, DenseIsOrthogonal) {
  for (const int n : {1, 2, 12, 16, 20, 28, 56, 80, 112, 144}) {
    std::vector<double> h(static_cast<size_t>(n) * n);
    hadamard_dense(hadamard_plan(n), h.data());
    for (int i = 0; i < n; ++i) {
      for (int j = 0; j < n; ++j) {
        double dot = 0;
        for (int k = 0; k < n; ++k) dot += h[i * n + k] * h[j * n + k];
        ASSERT_NEAR(dot, i == j ? 1.0 : 0.0, 1e-14) << n << ": rows " << i << ", " << j;
      }
    }
  }
}

TEST(Hadamard, EqualsDenseBothWays) {
  for_each_target([] {
    std::mt19937 random(1);
    std::normal_distribution<float> normal;
    for (const int n : kSizes) {
      const HadamardPlan plan = hadamard_plan(n);
      for (const bool inverse : {false, true}) {
        const int64_t stride = n + 3;  // rows need no alignment
        const int rows = 3;
        std::vector<float> x(rows * stride);
        for (float& v : x) v = normal(random);
        std::vector<double> want(x.begin(), x.end());
        hadamard_rows_ref(plan, inverse, want.data(), rows, stride);
        AlignedBytes lanes(sizeof(float) * n * kTokenBlock);
        for (int i = 0; i < n; ++i) {
          for (int t = 0; t < kTokenBlock; ++t) lanes.floats()[i * kTokenBlock + t] = x[t % rows * stride + i];
        }
        hadamard_rows(plan, inverse, x.data(), rows, stride);
        hadamard_lanes(plan, inverse, lanes.floats());
        // Every output is a sum of n terms of size 1 / sqrt(n): each of at most log2(n) + 28 roundings has half an ulp of about 4.
        const double bound = (std::log2(n) + 28) * 4 * 0x1p-24;
        for (int r = 0; r < rows; ++r) {
          for (int i = 0; i < n; ++i) ASSERT_NEAR(x[r * stride + i], want[r * stride + i], bound) << n << " row " << r << " channel " << i;
          for (int i = n; i < stride; ++i) ASSERT_EQ(x[r * stride + i], static_cast<float>(want[r * stride + i])) << "touched the gap";
        }
        for (int i = 0; i < n; ++i) {
          for (int t = 0; t < kTokenBlock; ++t) {
            ASSERT_NEAR(lanes.floats()[i * kTokenBlock + t], want[t % rows * stride + i], bound) << n << " lane " << t << " channel " << i;
          }
        }
      }
    }
  });
}

TEST(Hadamard, InverseUndoesForward) {
  for_each_target([] {
    std::mt19937 random(2);
    std::normal_distribution<float> normal;
    for (const int n : kSizes) {
      const HadamardPlan plan = hadamard_plan(n);
      AlignedBytes lanes(sizeof(float) * n * kTokenBlock);
      std::vector<float> before(n * kTokenBlock);
      for (float& v : before) v = normal(random);
      std::copy(before.begin(), before.end(), lanes.floats());
      hadamard_lanes(plan, false, lanes.floats());
      hadamard_lanes(plan, true, lanes.floats());
      double error = 0;
      double power = 0;
      for (size_t i = 0; i < before.size(); ++i) {
        error += std::pow(lanes.floats()[i] - before[i], 2);
        power += std::pow(before[i], 2);
      }
      // A rounding has a relative error of 2^-24 / sqrt(3) on average; there are two transforms of up to 28 + log2 steps.
      ASSERT_LT(error / power, 2 * (28 + std::log2(n)) * 0x1p-48) << n;
    }
  });
}

TEST(Hadamard, NoRowsAndManyRows) {
  float nothing = 7;
  hadamard_rows(hadamard_plan(64), false, &nothing, 0, 64);
  EXPECT_EQ(nothing, 7);
  for (const int n : {40, 64}) {  // beyond one group of 16 rows, with and without sixteen in the size
    std::vector<float> x(37 * n);
    for (size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(i % 11) - 5;
    std::vector<double> want(x.begin(), x.end());
    hadamard_rows_ref(hadamard_plan(n), false, want.data(), 37, n);
    hadamard_rows(hadamard_plan(n), false, x.data(), 37, n);
    for (size_t i = 0; i < x.size(); ++i) ASSERT_NEAR(x[i], want[i], 1e-4);
  }
}

}  // namespace
}  // namespace rotunda::kernels
