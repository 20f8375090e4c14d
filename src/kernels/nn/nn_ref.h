#pragma once

#include <cmath>

#include "base/half.h"
#include "kernels/nn/nn_params.h"

namespace rotunda::kernels {

/// Rounds to T: BFloat16, Half or float.
inline float round_as(float x, float) { return x; }
inline BFloat16 round_as(float x, BFloat16) { return to_bfloat16(x); }
inline Half round_as(float x, Half) { return to_half(x); }

/// What rms_norm_cuda does, one element at a time, sums in fp64: x + update is rounded to T, x * scale is rounded to T, and so is the product with the weight, as
/// Hugging Face does. A row that holds NaN or Inf becomes NaN where it is not 0.
template <typename T>
void rms_norm_ref(const RmsNorm& p) {
  const T* x = static_cast<const T*>(p.x);
  const T* weight = static_cast<const T*>(p.weight);
  T* y = static_cast<T*>(p.y);
  if (p.update != nullptr) {
    const T* update = static_cast<const T*>(p.update);
    T* sum = static_cast<T*>(p.sum);
    for (int64_t i = 0; i < p.n_rows * p.row_size; ++i) sum[i] = round_as(to_float(x[i]) + to_float(update[i]), T());
    x = sum;
  }
  for (int64_t row = 0; row < p.n_rows; ++row) {
    double sum = 0.0;
    for (int64_t i = 0; i < p.row_size; ++i) {
      const double value = to_float(x[row * p.row_size + i]);
      sum += value * value;
    }
    const float scale = static_cast<float>(1.0 / std::sqrt(sum / static_cast<double>(p.row_size) + static_cast<double>(p.eps)));
    for (int64_t i = 0; i < p.row_size; ++i) {
      const T scaled = round_as(to_float(x[row * p.row_size + i]) * scale, T());
      y[row * p.row_size + i] = round_as(to_float(scaled) * to_float(weight[i]), T());
    }
  }
}

/// What swiglu_cuda does: silu in fp32, rounded to T, then the product, rounded again.
template <typename T>
void swiglu_ref(const Swiglu& p) {
  const T* gate_up = static_cast<const T*>(p.gate_up);
  T* y = static_cast<T*>(p.y);
  for (int64_t row = 0; row < p.n_rows; ++row) {
    for (int64_t i = 0; i < p.row_size; ++i) {
      const double gate = to_float(gate_up[2 * row * p.row_size + i]);
      const T silu = round_as(static_cast<float>(gate / (1.0 + std::exp(-gate))), T());
      y[row * p.row_size + i] = round_as(to_float(silu) * to_float(gate_up[(2 * row + 1) * p.row_size + i]), T());
    }
  }
}

}  // namespace rotunda::kernels
