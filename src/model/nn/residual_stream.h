#pragma once

#include <ATen/core/Tensor.h>

#include <utility>

namespace rotunda::model::nn {

/// What runs through a transformer's layers: every block reads its norm and adds to it. On a GPU a sum waits for the norm that follows, which
/// does both in one kernel; the rounding is the same.
class ResidualStream {
 public:
  /// @param x [T, hidden_size]
  explicit ResidualStream(at::Tensor x) : x_(std::move(x)) {}

  /// Adds y times the transpose of `weight`, plus `bias` where it is defined. @param y [T, in]   @param weight [hidden_size, in]
  void add_linear(const at::Tensor& y, const at::Tensor& weight, const at::Tensor& bias);
  /// RMSNorm of all that was added so far, [T, hidden_size].
  at::Tensor norm(const at::Tensor& weight, double eps);
  /// As the last norm() saw it, [T, hidden_size].
  const at::Tensor& value() const { return x_; }

 private:
  at::Tensor x_;
  at::Tensor update_;  // not in x_ yet; undefined: nothing
};

}  // namespace rotunda::model::nn
