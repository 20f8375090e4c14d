#include "model/model_registry.h"

#include <utility>

#include "base/check.h"
#include "model_registrations.h"

namespace rotunda::model {

void ModelRegistry::add(ModelFamily family) {
  for (const ModelFamily& other : families_)
    ROTUNDA_ASSERT(other.architecture != family.architecture, "model family ", family.architecture,
                   " is registered twice");
  families_.push_back(std::move(family));
}

const ModelFamily& ModelRegistry::get(const ConfigFile& config) const {
  const std::vector<std::string> architectures = config.texts("architectures");
  ROTUNDA_CHECK(architectures.size() == 1, config.where("architectures"), " has ", architectures.size(),
                " entries, expected one");
  std::string known;
  for (const ModelFamily& family : families_) {
    if (family.architecture == architectures[0]) return family;
    known += (known.empty() ? "" : ", ") + family.architecture;
  }
  throw_user_error(
      concat(config.where("architectures"), " is \"", architectures[0].substr(0, 60), "\", expected one of ", known));
}

const ModelRegistry& model_registry() {
  static const ModelRegistry registry = [] {
    ModelRegistry all;
    register_all(all);
    return all;
  }();
  return registry;
}

}  // namespace rotunda::model
