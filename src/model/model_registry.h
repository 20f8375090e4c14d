#pragma once

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "model/causal_lm.h"
#include "model/config_file.h"

namespace rotunda::model {

/// A model family: how a checkpoint of one architecture becomes a model. One folder below model/ each.
struct ModelFamily {
  std::string architecture;  ///< as config.json's `architectures` names it
  /// What config.json alone tells. @throws Error{kUser} naming file and key.
  std::function<CausalLmInfo(const ModelFolder&, const CausalLmOptions&)> read_info;
  /// See load_causal_lm.
  std::function<std::shared_ptr<const CausalLm>(const ModelFolder&, const CausalLmOptions&)> load;
};

/// The families by architecture. Each folder of model/ adds its own through a register_<folder>(ModelRegistry&) that the
/// build finds.
class ModelRegistry {
 public:
  /// @throws Error{kBug} for an architecture taken already.
  void add(ModelFamily family);
  /// The family of a checkpoint. @throws Error{kUser} naming the file, the architecture and those there are.
  const ModelFamily& get(const ConfigFile& config) const;
  /// In the order of registration.
  const std::vector<ModelFamily>& all() const { return families_; }

 private:
  std::vector<ModelFamily> families_;
};

/// All families of this build.
const ModelRegistry& model_registry();

}  // namespace rotunda::model
