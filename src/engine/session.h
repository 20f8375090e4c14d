#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <set>
#include <vector>

#include "engine/control.h"
#include "io/tokenizer/tokenizer.h"
#include "kv/kv_registry.h"
#include "kv/kv_spec.h"
#include "model/causal_lm.h"

namespace rotunda::engine {

/// The cache that an evaluation measures against, and the default of generation: 16 bits, nothing lost.
inline constexpr const char* kReferenceKv = "bf16";

struct SessionOptions {
  std::filesystem::path model_dir;
  at::ScalarType dtype = at::kFloat;  ///< arithmetic and weights: kFloat, kBFloat16 or kHalf
  at::Device device = at::kCPU;       ///< of weights, arithmetic and caches
  int64_t device_budget_bytes = 0;    ///< what weights and cache may take of a GPU's memory together; 0: all that it has
  int threads = 0;                    ///< of the at::parallel_for pool; 0: as many as the machine has
  std::vector<kv::KvSpec> specs;      ///< caches that will be asked for; checked before any weight is read
  Progress progress;
};

/// A loaded model with its tokenizer, and the cache formats to choose from. The model is the one without any format's fusion.
struct Session {
  std::shared_ptr<const model::CausalLm> model;
  std::shared_ptr<const io::Tokenizer> tokenizer;
  const kv::KvRegistry* formats = nullptr;

  /// The token that stands in front of a text; none where the tokenizer has none.
  std::optional<int64_t> bos_id() const { return tokenizer->bos_id(); }
  /// Every token that ends a text, as config and tokenizer name them.
  std::set<int64_t> eos_ids() const;
};

/// Checks the specs against the model's config, then loads tokenizer and weights.
/// @throws Error{kUser} for a folder, a spec or a checkpoint that does not fit; Error{kWorld} for files.
Session load_session(const SessionOptions& options);

/// Throws what is wrong with one of the specs: unknown format or option, odd value, unsupported model.
void check_specs(const kv::KvRegistry& formats, const std::vector<kv::KvSpec>& specs, const kv::KvModel& model);

/// The whole of a text file. @throws Error{kWorld} naming path and reason.
std::string read_text_file(const std::filesystem::path& path);

}  // namespace rotunda::engine
