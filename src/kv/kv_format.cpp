#include "kv/kv_format.h"

#include <ATen/ATen.h>

#include "base/check.h"

namespace rotunda::kv {

KvSpec KvFormat::with_defaults(const KvSpec& spec) const {
  KvSpec full = spec;
  for (const KvOption& option : options()) full.options.try_emplace(option.name, option.default_value);
  return full;
}

ops::TensorBundle KvFormat::calibration_of_layers(const ops::TensorBundle& calibration, const KvModel& model,
                                                  const std::vector<int>& layers) const {
  ops::TensorBundle made = calibration;
  const at::Tensor rows = at::tensor(std::vector<int64_t>(layers.begin(), layers.end()), at::kLong);
  for (auto& [name, tensor] : made.tensors) {
    ROTUNDA_CHECK(tensor.dim() > 0 && tensor.size(0) == model.n_layers, calibration.origin, ": tensor ", name,
                  " has shape ", tensor.sizes(), ", expected ", model.n_layers, " layers");
    tensor = tensor.index_select(0, rows);
  }
  return made;
}

std::optional<std::string> device_unsupported_reason(const KvFormat& format, const KvModel& model, bool has_cuda_half) {
  if (model.device.is_cpu()) return std::nullopt;
#ifdef ROTUNDA_CUDA
  if (has_cuda_half) return std::nullopt;
#else
  (void)has_cuda_half;
  return concat(format.name(), " on ", model.device, ": this build has no CUDA half");
#endif
  return concat(format.name(), " on ", model.device, ": the format runs on the CPU alone");
}

}  // namespace rotunda::kv
