#include "kv/rotate/rotate_calibrator.h"

#include <ATen/ATen.h>

#include "base/check.h"
#include "kernels/hadamard/hadamard.h"
#include "kv/moments.h"

namespace rotunda::kv::rotate {

namespace {

class RotateCalibrator final : public KvCalibrator {
 public:
  explicit RotateCalibrator(const KvModel& model)
      : model_(model),
        sums_(at::zeros({model.n_layers, model.kv_channels()}, fp64_on(model.device))) {}

  void observe(int layer, const AttendInput& in) override {
    sums_[layer].add_(in.k.to(at::kDouble).sum(0).flatten());
    if (layer == 0) n_tokens_ += in.k.size(0);
  }

  ops::TensorBundle finish() override {
    ROTUNDA_CHECK(n_tokens_ > 0, "rotate: calibration saw no token");
    // The rotation is linear, so the sum of rotated keys is the rotated sum of keys.
    const kernels::HadamardPlan plan = kernels::hadamard_plan(heads_per_group(model_) * model_.head_dim);
    const at::Tensor matrix = at::empty({plan.n, plan.n}, at::kDouble);
    kernels::hadamard_dense(plan, matrix.data_ptr<double>());
    const at::Tensor rotated = at::matmul(sums_.to(at::kCPU).view({model_.n_layers, -1, plan.n}), matrix);  // [L, groups, n]
    ROTUNDA_CHECK(rotated.isfinite().all().item<bool>(), "rotate: calibration saw keys that are NaN or infinite");
    ops::TensorBundle bundle;
    const at::Tensor layer_order = rotated.flatten(1).argsort(/*stable=*/true, /*dim=*/1, /*descending=*/false);
    const at::Tensor group_offset = at::arange(rotated.size(1), at::kLong).view({1, -1, 1}) * plan.n;
    const at::Tensor group_order = (rotated.argsort(/*stable=*/true, /*dim=*/2, /*descending=*/false) + group_offset).flatten(1);
    bundle.tensors["rotate.perm.layer"] = layer_order.to(at::kInt);
    bundle.tensors["rotate.perm.group"] = group_order.to(at::kInt);
    bundle.tensors["rotate.key_mean"] = (rotated.flatten(1) / static_cast<double>(n_tokens_)).to(at::kFloat);
    bundle.metadata["rotate.heads_per_group"] = std::to_string(heads_per_group(model_));
    bundle.metadata["rotate.n_tokens"] = std::to_string(n_tokens_);
    return bundle;
  }

 private:
  KvModel model_;
  at::Tensor sums_;  // [n_layers, kv_channels] fp64, where the model runs
  int64_t n_tokens_ = 0;
};

}  // namespace

std::unique_ptr<KvCalibrator> make_rotate_calibrator(const KvModel& model) { return std::make_unique<RotateCalibrator>(model); }

std::vector<std::vector<uint16_t>> key_groups(const RotateOptions& options, const KvModel& model, const ops::TensorBundle& calibration) {
  const int channels = model.kv_channels();
  const int group_size = rotate_layout(options, model).group_size;
  std::vector<std::vector<uint16_t>> groups(static_cast<size_t>(model.n_layers), std::vector<uint16_t>(static_cast<size_t>(channels)));
  if (options.reorder == Reorder::kNone) {
    for (auto& table : groups)
      for (int channel = 0; channel < channels; ++channel) table[channel] = static_cast<uint16_t>(channel / group_size);
    return groups;
  }
  ROTUNDA_CHECK(!calibration.tensors.empty(), "rotate", options.bits, ": reorder=", options.reorder == Reorder::kLayer ? "layer" : "group",
                " needs a calibration, got none");
  const std::string name = options.reorder == Reorder::kLayer ? "rotate.perm.layer" : "rotate.perm.group";
  const int64_t calibrated_heads = calibration.meta_int("rotate.heads_per_group");
  ROTUNDA_CHECK(calibrated_heads == heads_per_group(model), calibration.origin, ": rotate.heads_per_group is ", calibrated_heads, ", expected ",
                heads_per_group(model));
  const at::Tensor perm = calibration.get(name, at::kInt, {model.n_layers, channels}).contiguous();
  for (int layer = 0; layer < model.n_layers; ++layer) {
    const int32_t* row = perm.data_ptr<int32_t>() + int64_t{layer} * channels;
    std::vector<bool> seen(static_cast<size_t>(channels));
    for (int place = 0; place < channels; ++place) {
      const int32_t channel = row[place];
      ROTUNDA_CHECK(channel >= 0 && channel < channels && !seen[channel], calibration.origin, ": tensor ", name, " of layer ", layer,
                    " is no permutation of ", channels, " channels (entry ", place, " is ", channel, ")");
      seen[channel] = true;
      groups[layer][channel] = static_cast<uint16_t>(place / group_size);
    }
  }
  return groups;
}

}  // namespace rotunda::kv::rotate
