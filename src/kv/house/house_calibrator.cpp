#include "kv/house/house_calibrator.h"

#include <ATen/ATen.h>

#include "base/check.h"
#include "kv/moments.h"

namespace rotunda::kv::house {

namespace {

class HouseCalibrator final : public KvCalibrator {
 public:
  explicit HouseCalibrator(const KvModel& model)
      : model_(model),
        query_moment_(at::zeros({model.n_layers, model.n_kv_heads, model.head_dim, model.head_dim}, fp64_on(model.device))),
        key_sum_(at::zeros({model.n_layers, model.n_kv_heads, model.head_dim}, fp64_on(model.device))),
        key_square_sum_(at::zeros_like(key_sum_)) {}

  void observe(int layer, const AttendInput& in) override {
    query_moment_[layer].add_(query_products(model_, in.q));
    const at::Tensor k = in.k.to(at::kDouble);
    key_sum_[layer].add_(k.sum(0));
    key_square_sum_[layer].add_(k.square().sum(0));
    if (layer == 0) n_tokens_ += in.k.size(0);
  }

  ops::TensorBundle finish() override {
    ROTUNDA_CHECK(n_tokens_ > 0, "rotunda: calibration saw no token");
    const double n = static_cast<double>(n_tokens_);
    const at::Tensor mean = key_sum_ / n;
    const at::Tensor variance = (key_square_sum_ / n - mean.square()).clamp_min(0.0);
    const at::Tensor moment = query_moment_ / (n * model_.n_heads / model_.n_kv_heads);
    ROTUNDA_CHECK(moment.isfinite().all().item<bool>() && variance.isfinite().all().item<bool>(),
                  "rotunda: calibration saw queries or keys that are NaN or infinite");
    ops::TensorBundle bundle;
    bundle.tensors["query_moment"] = moment.to(at::kFloat).to(at::kCPU);
    bundle.tensors["key_mean"] = mean.to(at::kFloat).to(at::kCPU);
    bundle.tensors["key_variance"] = variance.to(at::kFloat).to(at::kCPU);
    bundle.metadata["n_tokens"] = std::to_string(n_tokens_);
    return bundle;
  }

 private:
  KvModel model_;
  at::Tensor query_moment_, key_sum_, key_square_sum_;  // fp64, where the model runs
  int64_t n_tokens_ = 0;
};

}  // namespace

std::unique_ptr<KvCalibrator> make_house_calibrator(const KvModel& model) {
  return std::make_unique<HouseCalibrator>(model);
}

}  // namespace rotunda::kv::house
