#pragma once

#include <map>
#include <string>
#include <string_view>
#include <vector>

namespace rotunda::kv {

struct KvSpecPart;

/// A cache format with its options, as a user names it: `rotate2:recent=64,sinks=20,clip=0.8`. Or a mix, in which layers have formats of
/// their own: `layers 0,1,-1=bf16;rotunda2`. docs/formats.md has the grammar.
struct KvSpec {
  std::string format = "bf16";                 ///< kMixFormat for a mix
  std::map<std::string, std::string> options;  ///< only those given; a format's own defaults fill the rest
  std::vector<KvSpecPart> parts;               ///< of a mix, as they were named; empty in any other spec

  /// The same text back, options in alphabetical order.
  std::string to_string() const;
  bool operator==(const KvSpec&) const;
};

/// The format of a mix. No format of the registry has the name.
inline constexpr const char* kMixFormat = "mix";

/// Layers first to last, both in; negative numbers count from the end, -1 being the last layer.
struct LayerRange {
  int first = 0;
  int last = 0;
  bool operator==(const LayerRange&) const = default;
};

/// Some layers of a mix.
struct KvSpecPart {
  std::vector<LayerRange> layers;  ///< empty: all that no other part names
  KvSpec spec;                     ///< not a mix
  bool operator==(const KvSpecPart&) const = default;
};

/// Reads one spec. @throws Error{kUser} naming the text and what was expected where.
KvSpec parse_kv_spec(std::string_view text);

/// Reads SPEC[,SPEC...]. What follows a comma goes on with the spec before it where it is KEY=VALUE without a ':' and neither `layers ...`
/// nor `k=` nor `v=`, else it begins the next spec. `k=SPEC,v=SPEC` is read as the one spec that KvFormat::with_values makes of the two.
/// @throws Error{kUser} as parse_kv_spec, and for an empty list.
std::vector<KvSpec> parse_kv_specs(std::string_view text);

}  // namespace rotunda::kv
