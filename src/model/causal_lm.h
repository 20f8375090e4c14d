#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "kv/kv_cache.h"
#include "kv/kv_format.h"

namespace rotunda::model {

/// What is known of a language model before and after its weights are read.
struct CausalLmInfo {
  std::string architecture;  ///< as in config.json, for example "LlamaForCausalLM"
  kv::KvModel kv;
  int vocab_size = 0;
  int intermediate_size = 0;
  bool tied_embeddings = false;
  int64_t max_position_embeddings = 0;  ///< the context that the model was trained for
  std::vector<int64_t> bos_token_ids;   ///< at most one
  std::vector<int64_t> eos_token_ids;
  int64_t n_parameters = 0;  ///< counted from the shapes that the config implies, tied weights once
  int64_t weights_bytes() const { return n_parameters * static_cast<int64_t>(c10::elementSize(kv.dtype)); }
};

/// A decoder-only language model on one device.
class CausalLm {
 public:
  virtual ~CausalLm() = default;

  virtual const CausalLmInfo& info() const = 0;

  /// Runs the tokens of the step that `cache` has open (KvCache::begin_step; the caller ends or aborts it).
  /// @param tokens [T] int64, the chunks of the step one after the other; checked where they lie on the CPU, trusted where they lie on
  ///   the model's GPU (to look at them would wait for it)
  /// @return [T, hidden_size] after the final norm
  virtual at::Tensor forward(const at::Tensor& tokens, kv::KvCache& cache) const = 0;
  /// @param hidden [N, hidden_size]   @return [N, vocab_size] fp32
  virtual at::Tensor logits(const at::Tensor& hidden) const = 0;

  /// The same model with the projections that `format` wants (KvFormat::fuse); all other weights are shared. Call it on the
  /// model as loaded, not on a fused one.
  /// @param setup holds the calibration, if any; afterwards all that KvFormat::make_cache wants
  /// @throws Error{kUser} with the format's reason where it does not support the model.
  virtual std::shared_ptr<const CausalLm> with_kv_format(const kv::KvFormat& format, const kv::KvSpec& spec,
                                                         ops::TensorBundle& setup) const = 0;

  /// SHA-256 (hex) over names, shapes and bytes of the weights as they stand in the checkpoint: ties a calibration to them.
  virtual const std::string& weights_hash() const = 0;
};

struct CausalLmOptions {
  at::ScalarType dtype = at::kFloat;  ///< arithmetic and weights: kFloat, kBFloat16 or kHalf
  at::Device device = at::kCPU;       ///< of weights and arithmetic; checked by the caller (ops::require_device)
  int64_t device_budget_bytes = 0;    ///< see kv::KvModel
  std::function<void(int64_t done_bytes, int64_t total_bytes)>
      progress;  ///< called from the loading thread; may be empty
};

/// Reads config.json alone; what the model would be, loaded with these options.
/// @throws Error{kUser} for an unknown architecture or value, naming file and key.
CausalLmInfo read_causal_lm_info(const std::string& model_dir, const CausalLmOptions& options = {});

/// Loads a Hugging Face folder; the family is found by the architecture in config.json (one folder below model/ each).
/// @throws Error{kUser} for an unsupported or inconsistent checkpoint, NaN or Inf in a weight; Error{kWorld} for files.
std::shared_ptr<const CausalLm> load_causal_lm(const std::string& model_dir, const CausalLmOptions& options);

}  // namespace rotunda::model
