#include "model/nn/linear.h"

#include <ATen/ATen.h>

namespace rotunda::model::nn {

int64_t LinearStack::first_row(size_t index) const {
  int64_t row = 0;
  for (size_t i = 0; i < index; ++i) row += out_features[i];
  return row;
}

at::Tensor LinearStack::weight(size_t index) const {
  return stacked() ? weights[0].narrow(0, first_row(index), out_features[index]) : weights[index];
}

at::Tensor LinearStack::bias(size_t index) const {
  if (!stacked()) return biases[index];
  return biases[0].defined() ? biases[0].narrow(0, first_row(index), out_features[index]) : at::Tensor();
}

std::vector<at::Tensor> LinearStack::operator()(const at::Tensor& x) const {
  if (stacked()) return at::split_with_sizes(at::linear(x, weights[0], biases[0]), out_features, 1);
  std::vector<at::Tensor> results;
  results.reserve(weights.size());
  for (size_t i = 0; i < weights.size(); ++i) results.push_back(at::linear(x, weights[i], biases[i]));
  return results;
}

at::Tensor linear_add(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias,
                      const at::Tensor& residual) {
  // One call for GEMM and sum; in 16 bits the plain GEMM takes a faster path, and the sum is rounded as Hugging Face does.
  if (!bias.defined() && x.scalar_type() == at::kFloat) return at::addmm(residual, x, weight.t());
  return at::linear(x, weight, bias).add_(residual);
}

}  // namespace rotunda::model::nn
