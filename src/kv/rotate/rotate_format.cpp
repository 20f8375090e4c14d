#include "kv/rotate/rotate_format.h"

#include <ATen/ATen.h>

#include "base/check.h"
#include "kernels/hadamard/hadamard.h"
#include "kv/rotate/rotate_cache.h"
#include "kv/rotate/rotate_calibrator.h"
#include "kv/rotate/rotate_options.h"
#include "kv/windowed_cache.h"

namespace rotunda::kv::rotate {

namespace {

at::Tensor hadamard_matrix(int n, at::ScalarType dtype) {
  const at::Tensor matrix = at::empty({n, n}, at::kDouble);
  kernels::hadamard_dense(kernels::hadamard_plan(n), matrix.data_ptr<double>());
  return matrix.to(dtype);
}

// Rows of `weight` [channels, in] or a bias [channels]: y <- y H for every run of n output channels.
void rotate_outputs(at::Tensor& weight, const at::Tensor& matrix) {
  if (!weight.defined()) return;
  const at::Tensor runs = weight.reshape({-1, matrix.size(0), weight.dim() == 2 ? weight.size(1) : 1});
  weight = at::matmul(matrix.t(), runs).reshape(weight.sizes());
}

}  // namespace

std::string RotateFormat::summary() const {
  return "RotateKV (arXiv:2501.16383): " + std::to_string(bits_) + "-bit codes of keys and values, rotated and reordered by calibration";
}

std::vector<KvOption> RotateFormat::options() const { return RotateOptions::describe(bits_); }

void RotateFormat::validate(const KvSpec& spec) const { RotateOptions::from_spec(spec, bits_); }

std::optional<std::string> RotateFormat::unsupported_reason(const KvSpec& spec, const KvModel& model) const {
  if (model.head_dim % 16 != 0) return concat(name(), " on cpu: head_dim ", model.head_dim, " is not a multiple of 16");
  try {
    rotate_layout(RotateOptions::from_spec(spec, bits_), model);
  } catch (const Error& error) {
    return error.what();
  }
  return std::nullopt;
}

bool RotateFormat::needs_calibration(const KvSpec& spec) const { return RotateOptions::from_spec(spec, bits_).reorder != Reorder::kNone; }

std::unique_ptr<KvCalibrator> RotateFormat::make_calibrator(const KvModel& model) const { return make_rotate_calibrator(model); }

void RotateFormat::fuse(const KvSpec&, const KvModel& model, ProjectionWeights& weights) const {
  if (!model.key_norm) {
    const at::Tensor group_matrix = hadamard_matrix(heads_per_group(model) * model.head_dim, at::kFloat);
    rotate_outputs(weights.k_weight, group_matrix);
    rotate_outputs(weights.k_bias, group_matrix);
  }
  const at::Tensor head_matrix = hadamard_matrix(model.head_dim, at::kFloat);
  rotate_outputs(weights.v_weight, head_matrix);
  rotate_outputs(weights.v_bias, head_matrix);
  // y = o W_o^T with o = o' H^T, so W_o <- W_o H for the columns of every query head.
  const at::Tensor heads = weights.o_weight.view({weights.o_weight.size(0), model.n_heads, model.head_dim});
  weights.o_weight = at::matmul(heads, head_matrix).reshape(weights.o_weight.sizes());
}

int64_t RotateFormat::planned_bytes(const KvSpec& spec, const KvModel& model, int64_t kv_len) const {
  const RotateOptions options = RotateOptions::from_spec(spec, bits_);
  return planned_windowed_bytes(options.exact, model, rotate_layout(options, model).page_bytes(), kv_len);
}

std::unique_ptr<KvCache> RotateFormat::make_cache(const KvSpec& spec, const KvModel& model, const ops::TensorBundle* calibration) const {
  const RotateOptions options = RotateOptions::from_spec(spec, bits_);
  const auto reason = unsupported_reason(spec, model);
  ROTUNDA_CHECK(!reason, *reason);
  return make_rotate_cache(spec, model, options, key_groups(options, model, calibration));
}

}  // namespace rotunda::kv::rotate
