#include "kv/mix/mix_plan.h"

#include <algorithm>

#include "base/check.h"
#include "kv/kv_registry.h"

namespace rotunda::kv::mix {

namespace {

int absolute(int layer, const KvModel& model, const KvSpec& spec) {
  ROTUNDA_CHECK(layer >= -model.n_layers && layer < model.n_layers, "kv spec '", spec.to_string(), "': layer ", layer,
                ", the model has layers 0 to ", model.n_layers - 1, " (or -", model.n_layers, " to -1)");
  return layer < 0 ? layer + model.n_layers : layer;
}

// [n_layers] the index of the spec's part that each layer belongs to.
std::vector<int> assign(const KvSpec& spec, const KvModel& model) {
  constexpr int kNone = -1;
  std::vector<int> part_of(static_cast<size_t>(model.n_layers), kNone);
  int rest = kNone;
  for (size_t i = 0; i < spec.parts.size(); ++i) {
    if (spec.parts[i].layers.empty()) rest = static_cast<int>(i);
    for (const LayerRange& range : spec.parts[i].layers) {
      const int first = absolute(range.first, model, spec), last = absolute(range.last, model, spec);
      ROTUNDA_CHECK(first <= last, "kv spec '", spec.to_string(), "': layers ", range.first, "-", range.last,
                    " end before they begin");
      for (int layer = first; layer <= last; ++layer) {
        int& part = part_of[static_cast<size_t>(layer)];
        ROTUNDA_CHECK(part == kNone, "kv spec '", spec.to_string(), "': layer ", layer, " is named twice");
        part = static_cast<int>(i);
      }
    }
  }
  const auto open = std::find(part_of.begin(), part_of.end(), kNone);
  ROTUNDA_CHECK(open == part_of.end() || rest != kNone, "kv spec '", spec.to_string(), "': layer ",
                open - part_of.begin(), " has no format, expected '; FORMAT' at the end for the remaining layers");
  ROTUNDA_CHECK(open != part_of.end() || rest == kNone, "kv spec '", spec.to_string(), "': no layer remains for ",
                spec.parts.back().spec.to_string());
  std::replace(part_of.begin(), part_of.end(), kNone, rest);
  return part_of;
}

}  // namespace

MixPlan::MixPlan(const KvSpec& spec, const KvModel& model) : places(static_cast<size_t>(model.n_layers)) {
  const std::vector<int> part_of = assign(spec, model);
  for (size_t i = 0; i < spec.parts.size(); ++i) {
    const KvSpec& part_spec = spec.parts[i].spec;
    auto part = std::find_if(parts.begin(), parts.end(), [&](const MixPart& other) { return other.spec == part_spec; });
    if (part == parts.end())
      part = parts.insert(parts.end(),
                          {.spec = part_spec, .format = &kv_registry().get(part_spec), .layers = {}, .model = model});
    for (int layer = 0; layer < model.n_layers; ++layer)
      if (part_of[static_cast<size_t>(layer)] == static_cast<int>(i)) part->layers.push_back(layer);
  }
  for (size_t i = 0; i < parts.size(); ++i) {
    MixPart& part = parts[i];
    std::sort(part.layers.begin(), part.layers.end());
    part.model.n_layers = static_cast<int>(part.layers.size());
    part.model.layer_ids = part.layers;
    for (size_t at = 0; at < part.layers.size(); ++at)
      places[static_cast<size_t>(part.layers[at])] = {.part = static_cast<int>(i), .layer = static_cast<int>(at)};
  }
}

KvSpec MixPlan::spec() const {
  KvSpec made{.format = kMixFormat, .options = {}, .parts = {}};
  for (const MixPart& part : parts) {
    KvSpecPart& one = made.parts.emplace_back();
    one.spec = part.spec;
    for (const int layer : part.layers) {
      if (!one.layers.empty() && one.layers.back().last + 1 == layer) {
        one.layers.back().last = layer;
      } else {
        one.layers.push_back({layer, layer});
      }
    }
  }
  return made;
}

ops::TensorBundle part_calibration(const MixPart& part, const KvModel& model, const ops::TensorBundle& setup) {
  if (part.format->calibration_use(part.spec) == CalibrationUse::kNone) return {};
  return part.format->calibration_of_layers(setup.part(part.format->calibration_name() + "/"), model, part.layers);
}

std::string part_prefix(size_t index) { return concat("part.", index, "/"); }

}  // namespace rotunda::kv::mix
