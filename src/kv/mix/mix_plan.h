#pragma once

#include <string>
#include <vector>

#include "kv/kv_format.h"

namespace rotunda::kv::mix {

/// The layers of a model that share a format, as that format sees them: a model of their own.
struct MixPart {
  KvSpec spec;
  const KvFormat* format = nullptr;  ///< owned by the registry
  std::vector<int> layers;           ///< of the whole model, in rising order; at least one
  KvModel model;
};

/// Where a layer of the whole model went.
struct MixPlace {
  int part = -1;
  int layer = -1;  ///< among the part's
};

/// A mix brought to one model. Parts of one spec are one.
struct MixPlan {
  std::vector<MixPart> parts;    ///< in the order of the spec
  std::vector<MixPlace> places;  ///< [n_layers]

  /// @throws Error{kUser} naming a layer that does not exist, is named twice or has no format, and a format without a layer.
  MixPlan(const KvSpec& spec, const KvModel& model);

  /// The spec with plain layer numbers and the parts' specs as they are here.
  KvSpec spec() const;
};

/// What a part gets of a setup for the mix: its layers' share of the calibration, empty where there is none for its format.
ops::TensorBundle part_calibration(const MixPart& part, const KvModel& model, const ops::TensorBundle& setup);

/// What stands in front of the names of part `index` in setups and saved caches. No calibration is named so.
std::string part_prefix(size_t index);

}  // namespace rotunda::kv::mix
