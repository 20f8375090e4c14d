#pragma once

#include <memory>
#include <string>
#include <vector>

#include "kv/kv_format.h"

namespace rotunda::kv {

/// The cache formats by name. Each folder of kv/ adds its own through a register_<folder>(KvRegistry&) that the build finds.
class KvRegistry {
 public:
  /// @throws Error{kBug} for a name taken already.
  void add(std::unique_ptr<KvFormat> format);
  /// @throws Error{kUser} listing the names there are.
  const KvFormat& get(const std::string& name) const;
  /// The format that reads this spec; for a mix the one that puts layers together. @throws as above.
  const KvFormat& get(const KvSpec& spec) const { return spec.parts.empty() ? get(spec.format) : *mix_; }
  /// The single formats, in the order of registration.
  const std::vector<std::unique_ptr<KvFormat>>& all() const { return formats_; }

  void set_mix(std::unique_ptr<KvFormat> mix) { mix_ = std::move(mix); }

 private:
  std::vector<std::unique_ptr<KvFormat>> formats_;
  std::unique_ptr<KvFormat> mix_;
};

/// All formats of this build.
const KvRegistry& kv_registry();

}  // namespace rotunda::kv
