#include "kv/grouped/grouped_calibrator.h"

#include <ATen/ATen.h>

#include "base/check.h"
#include "kv/moments.h"

namespace rotunda::kv::grouped {

namespace {

class GroupedCalibrator final : public KvCalibrator {
 public:
  explicit GroupedCalibrator(const KvModel& model)
      : model_(model),
        query_(at::zeros({model.n_layers, model.n_kv_heads, model.head_dim, model.head_dim}, fp64_on(model.device))),
        value_(at::zeros_like(query_)),
        key_square_sum_(at::zeros({model.n_layers, model.n_kv_heads, model.head_dim}, fp64_on(model.device))),
        value_sum_(at::zeros_like(key_square_sum_)) {}

  void observe(int layer, const AttendInput& in) override {
    query_[layer].add_(query_products(model_, in.q));
    key_square_sum_[layer].add_(in.k.to(at::kDouble).square().sum(0));
    const at::Tensor v = in.v.to(at::kDouble).transpose(0, 1);  // [n_kv_heads, T, d]
    value_[layer].add_(at::bmm(v.transpose(1, 2), v));
    value_sum_[layer].add_(v.sum(1));
    if (layer == 0) n_tokens_ += in.k.size(0);
  }

  ops::TensorBundle finish() override {
    ROTUNDA_CHECK(n_tokens_ > 0, "grouped: calibration saw no token");
    const double n = static_cast<double>(n_tokens_);
    const std::pair<const char*, at::Tensor> parts[] = {
        {"query_moment", query_ / (n * model_.n_heads / model_.n_kv_heads)},
        {"key_energy", key_square_sum_ / n},
        {"value_moment", value_ / n},
        {"value_mean", value_sum_ / n}};
    ops::TensorBundle bundle;
    for (const auto& [name, tensor] : parts) {
      ROTUNDA_CHECK(tensor.isfinite().all().item<bool>(),
                    "grouped: calibration saw queries, keys or values that are NaN or infinite");
      bundle.tensors[name] = tensor.to(at::kFloat).to(at::kCPU);
    }
    bundle.metadata["n_tokens"] = std::to_string(n_tokens_);
    return bundle;
  }

 private:
  KvModel model_;
  at::Tensor query_, value_, key_square_sum_, value_sum_;  // fp64, where the model runs
  int64_t n_tokens_ = 0;
};

}  // namespace

std::unique_ptr<KvCalibrator> make_grouped_calibrator(const KvModel& model) {
  return std::make_unique<GroupedCalibrator>(model);
}

GroupedMoments grouped_moments(const KvModel& model, int layer, const ops::TensorBundle& calibration) {
  const int64_t n_layers = model.n_layers, heads = model.n_kv_heads, d = model.head_dim;
  const auto part = [&](const char* name, at::IntArrayRef sizes) {
    return calibrated_layer(calibration, name, sizes, layer);
  };
  GroupedMoments moments;
  moments.query = part("query_moment", {n_layers, heads, d, d});
  moments.key_energy = part("key_energy", {n_layers, heads, d});
  const at::Tensor value = part("value_moment", {n_layers, heads, d, d});
  const at::Tensor mean = part("value_mean", {n_layers, heads, d});
  moments.value = value - mean.unsqueeze(2) * mean.unsqueeze(1);
  moments.value_energy = value.diagonal(0, 1, 2);
  return moments;
}

}  // namespace rotunda::kv::grouped
