// RMSNorm and SwiGLU on a GPU against the scalar references.

#include <gtest/gtest.h>

#include "kernels/nn/nn_cuda.h"
#include "kernels/nn_case.h"
#include "kernels/run_on_gpu.h"

namespace rotunda::kernels {
namespace {

using testing::OnGpu;

class NnGpuTest : public ::testing::Test {
 protected:
  void SetUp() override { ROTUNDA_SKIP_WITHOUT_GPU(); }
};

template <typename T>
double norm_error(int64_t n_rows, int64_t row_size) {
  return testing::rms_norm_error<T>(n_rows, row_size, [](RmsNorm p, testing::NormRows<T>& rows) {
    const OnGpu x(rows.x), weight(rows.weight), update(rows.update), y(rows.y), sum(rows.sum);
    p.x = x.as<T>();
    p.weight = weight.as<T>();
    p.y = y.as<T>();
    if (p.update != nullptr) {
      p.update = update.as<T>();
      p.sum = sum.as<T>();
    }
    testing::check_cuda(rms_norm_cuda(p, testing::kTypeOf<T>, nullptr), "rms_norm_cuda");
    testing::check_cuda(cudaMemcpy(rows.y.data(), p.y, rows.y.size() * sizeof(T), cudaMemcpyDeviceToHost), "kernel");
    if (p.sum == nullptr) return;
    testing::check_cuda(cudaMemcpy(rows.sum.data(), p.sum, rows.sum.size() * sizeof(T), cudaMemcpyDeviceToHost), "kernel");
  });
}

template <typename T>
double swiglu_error(int64_t n_rows, int64_t row_size) {
  return testing::swiglu_error<T>(n_rows, row_size, [](Swiglu p, const std::vector<T>& gate_up, std::vector<T>& y) {
    const OnGpu gpu_gate_up(gate_up), gpu_y(y);
    p.gate_up = gpu_gate_up.as<T>();
    p.y = gpu_y.as<T>();
    testing::check_cuda(swiglu_cuda(p, testing::kTypeOf<T>, nullptr), "swiglu_cuda");
    testing::check_cuda(cudaMemcpy(y.data(), p.y, y.size() * sizeof(T), cudaMemcpyDeviceToHost), "kernel");
  });
}

// As in nn_test, for the lengths of real models; fp32 sums of 8,192 squares in 256 parts.
TEST_F(NnGpuTest, NormOfFewRows) {
  for (const int64_t row_size : {7, 81, 128, 896, 4096, 5120, 8192}) {
    SCOPED_TRACE(row_size);
    EXPECT_LE(norm_error<BFloat16>(3, row_size), 2.0);
    EXPECT_LE(norm_error<Half>(5, row_size), 2.0);
    EXPECT_LE(norm_error<float>(2, row_size), 16.0);
  }
}
TEST_F(NnGpuTest, SwigluOfFewRows) {
  for (const int64_t row_size : {1, 11, 1024, 13824, 14336}) {
    SCOPED_TRACE(row_size);
    EXPECT_LE(swiglu_error<BFloat16>(3, row_size), 2.0);
    EXPECT_LE(swiglu_error<Half>(1, row_size), 2.0);
    EXPECT_LE(swiglu_error<float>(2, row_size), 16.0);
  }
}
TEST_F(NnGpuTest, Refuses) {
  EXPECT_EQ(rms_norm_cuda({.n_rows = 1, .row_size = 0}, ElementType::kBf16, nullptr), cudaErrorInvalidValue);
  EXPECT_EQ(swiglu_cuda({.n_rows = -1, .row_size = 8}, ElementType::kBf16, nullptr), cudaErrorInvalidValue);
  const float x = 0.0F;
  EXPECT_EQ(rms_norm_cuda({.n_rows = 1, .row_size = 1, .update = &x}, ElementType::kFp32, nullptr), cudaErrorInvalidValue);
  EXPECT_EQ(rms_norm_cuda({.n_rows = 0, .row_size = 8}, ElementType::kBf16, nullptr), cudaSuccess);
}

}  // namespace
}  // namespace rotunda::kernels
