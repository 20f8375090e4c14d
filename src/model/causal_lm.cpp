#include "model/causal_lm.h"

#include "base/check.h"
#include "model/model_registry.h"

namespace rotunda::model {

namespace {

void check_dtype(at::ScalarType dtype) {
  ROTUNDA_CHECK(dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf, "model dtype ", dtype,
                ", expected Float, BFloat16 or Half");
}

}  // namespace

CausalLmInfo read_causal_lm_info(const std::string& model_dir, const CausalLmOptions& options) {
  check_dtype(options.dtype);
  const ModelFolder folder = ModelFolder::open(model_dir);
  return model_registry().get(folder.config).read_info(folder, options);
}

std::shared_ptr<const CausalLm> load_causal_lm(const std::string& model_dir, const CausalLmOptions& options) {
  check_dtype(options.dtype);
  ROTUNDA_CHECK(options.dtype != at::kHalf || options.device.is_cuda(), "model dtype Half on ", options.device, ", expected Float or BFloat16");
  const ModelFolder folder = ModelFolder::open(model_dir);
  return model_registry().get(folder.config).load(folder, options);
}

}  // namespace rotunda::model
