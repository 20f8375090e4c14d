#pragma once

#include <algorithm>
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

/// What a norm reads and writes.
template <typename T>
struct NormRows {
  std::vector<T> x, weight, update, y, sum;  ///< update, sum: empty for a norm alone
};

/// Runs a kernel on random rows, with an update in every other case, and compares norms and sums. @param run (params, rows) fills y and sum
template <typename T, typename Run>
double rms_norm_error(int64_t n_rows, int64_t row_size, const Run& run) {
  double error = 0.0;
  for (const bool with_update : {false, true}) {
    std::mt19937 random(static_cast<uint32_t>(31 * n_rows + row_size));
    const auto n = static_cast<size_t>(n_rows * row_size);
    NormRows<T> rows;
    rows.x = random_values<T>(n, 3.0F, random);
    rows.weight = random_values<T>(static_cast<size_t>(row_size), 1.0F, random);
    if (with_update) rows.update = random_values<T>(n, 3.0F, random);
    rows.y.resize(n);
    rows.sum.resize(rows.update.size());
    NormRows<T> expected = rows;
    const RmsNorm p{.x = rows.x.data(),
                    .weight = rows.weight.data(),
                    .y = expected.y.data(),
                    .n_rows = n_rows,
                    .row_size = row_size,
                    .eps = 1e-5F,
                    .update = with_update ? rows.update.data() : nullptr,
                    .sum = with_update ? expected.sum.data() : nullptr};
    rms_norm_ref<T>(p);
    run(p, rows);
    error = std::max({error, largest_error(rows.y, expected.y), 1e9 * largest_error(rows.sum, expected.sum)});  // sums: the same bits
  }
  return error;
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
