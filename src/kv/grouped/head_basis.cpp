#include "kv/grouped/head_basis.h"

#include <ATen/ATen.h>

#include <algorithm>

#include "kernels/attention/token_block.h"
#include "kv/head_rotation.h"

namespace rotunda::kv::grouped {

using kernels::kTokenBlock;

HeadBasis HeadBasis::permutation(const at::Tensor& order) {
  HeadBasis basis;
  basis.order_ = order.contiguous();
  return basis;
}

HeadBasis HeadBasis::hadamard(int head_dim) {
  HeadBasis basis;
  basis.plan_ = kernels::hadamard_plan(head_dim);
  return basis;
}

HeadBasis HeadBasis::dense(const at::Tensor& matrix) {
  HeadBasis basis;
  basis.matrix_ = matrix.contiguous();
  return basis;
}

void HeadBasis::apply(int head, float* rows, int64_t n_rows, int64_t row_stride) const {
  if (order_.defined()) {
    const int64_t d = order_.size(1);
    const int64_t* const order = order_.const_data_ptr<int64_t>() + head * d;
    std::vector<float> from(static_cast<size_t>(d));
    for (int64_t r = 0; r < n_rows; ++r) {
      float* const row = rows + r * row_stride;
      std::copy(row, row + d, from.begin());
      for (int64_t i = 0; i < d; ++i) row[i] = from[order[i]];
    }
  }
  if (plan_.n != 0) kernels::hadamard_rows(plan_, /*inverse=*/false, rows, n_rows, row_stride);
  if (matrix_.defined()) {
    const int64_t d = matrix_.size(1);
    const float* const matrix = matrix_.const_data_ptr<float>() + head * d * d;
    std::vector<float> sum(static_cast<size_t>(d));
    for (int64_t r = 0; r < n_rows; ++r) {
      float* const row = rows + r * row_stride;
      std::fill(sum.begin(), sum.end(), 0.0F);
      for (int64_t i = 0; i < d; ++i)
        for (int64_t j = 0; j < d; ++j) sum[j] += row[i] * matrix[i * d + j];
      std::copy(sum.begin(), sum.end(), row);
    }
  }
}

void HeadBasis::undo_lanes(int head, float* lanes) const {
  if (order_.defined()) {
    const int64_t d = order_.size(1);
    const int64_t* const order = order_.const_data_ptr<int64_t>() + head * d;
    const std::vector<float> from(lanes, lanes + d * kTokenBlock);
    for (int64_t i = 0; i < d; ++i)
      std::copy_n(from.data() + i * kTokenBlock, kTokenBlock, lanes + order[i] * kTokenBlock);
  }
  if (plan_.n != 0) kernels::hadamard_lanes(plan_, /*inverse=*/true, lanes);
  if (matrix_.defined()) {
    const int64_t d = matrix_.size(1);
    const float* const matrix = matrix_.const_data_ptr<float>() + head * d * d;
    const std::vector<float> from(lanes, lanes + d * kTokenBlock);
    for (int64_t i = 0; i < d; ++i) {
      float* const to = lanes + i * kTokenBlock;
      std::fill_n(to, kTokenBlock, 0.0F);
      for (int64_t j = 0; j < d; ++j)
        for (int t = 0; t < kTokenBlock; ++t) to[t] += matrix[i * d + j] * from[j * kTokenBlock + t];
    }
  }
}

at::Tensor HeadBasis::matrix() const {
  if (matrix_.defined()) return matrix_;
  if (order_.defined()) {  // B[order[i]][i] = 1
    const int64_t d = order_.size(1);
    return at::zeros({order_.size(0), d, d}).scatter(1, order_.unsqueeze(1), at::ones({order_.size(0), 1, d}));
  }
  if (plan_.n == 0) return {};
  return hadamard_matrix(plan_.n, at::kFloat).unsqueeze(0);
}

}  // namespace rotunda::kv::grouped
