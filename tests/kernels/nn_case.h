#pragma once

#include <cmath>
#include <random>
#include <vector>

#include "base/half.h"
#include "kernels/attention/decode_attention.h"
#include "kernels/nn/nn_ref.h"

namespace rotunda::kernels::testing {

template <typename T>
inline constexpr ElementType kTypeOf = ElementType::kFp32;
template <>
inline constexpr ElementType kTypeOf<BFloat16> = ElementType::kBf16;
template <>
inline constexpr ElementType kTypeOf<Half> = ElementType::kFp16;

/// Steps between neighbouring values of T around 1: what a sum in another order may move a result by.
template <typename T>
inline constexpr double kStep = 0x1p-23;
template <>
inline constexpr double kStep<BFloat16> = 0x1p-7;
template <>
inline constexpr double kStep<Half> = 0x1p-10;

template <typename T>
std::vector<T> random_values(size_t n, float spread, std::mt19937& random) {
  std::normal_distribution<float> normal(0.0F, spread);
  std::vector<T> values;
  for (size_t i = 0; i < n; ++i) values.push_back(round_as(normal(random), T()));
  return values;
}

/// The largest difference in steps of T at the expected value.
template <typename T>
double largest_error(const std::vector<T>& got, const std::vector<T>& expected) {
  double largest = 0.0;
  for (size_t i = 0; i < got.size(); ++i) {
    const double want = to_float(expected[i]);
    const double step = kStep<T> * std::max(std::abs(want), 1e-4);
    const double error = std::abs(to_float(got[i]) - want) / step;
    if (!(error <= largest)) largest = error;  // NaN too
  }
  return largest;
}

/// Runs a kernel on random rows and compares. @param run (params, x, weight, y as vectors) fills y
template <typename T, typename Run>
double rms_norm_error(int64_t n_rows, int64_t row_size, const Run& run) {
  std::mt19937 random(static_cast<uint32_t>(31 * n_rows + row_size));
  const std::vector<T> x = random_values<T>(static_cast<size_t>(n_rows * row_size), 3.0F, random);
  const std::vector<T> weight = random_values<T>(static_cast<size_t>(row_size), 1.0F, random);
  std::vector<T> expected(x.size());
  std::vector<T> y(x.size());
  RmsNorm p{x.data(), weight.data(), expected.data(), n_rows, row_size, 1e-5F};
  rms_norm_ref<T>(p);
  run(p, x, weight, y);
  return largest_error(y, expected);
}

template <typename T, typename Run>
double swiglu_error(int64_t n_rows, int64_t row_size, const Run& run) {
  std::mt19937 random(static_cast<uint32_t>(17 * n_rows + row_size));
  std::vector<T> gate_up = random_values<T>(static_cast<size_t>(2 * n_rows * row_size), 4.0F, random);
  gate_up[0] = round_as(-200.0F, T());  // exp overflows in fp32
  std::vector<T> expected(static_cast<size_t>(n_rows * row_size));
  std::vector<T> y(expected.size());
  Swiglu p{gate_up.data(), expected.data(), n_rows, row_size};
  swiglu_ref<T>(p);
  run(p, gate_up, y);
  return largest_error(y, expected);
}

}  // namespace rotunda::kernels::testing
