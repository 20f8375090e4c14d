#pragma once

#include <map>
#include <string>
#include <string_view>
#include <vector>

namespace rotunda::kv {

/// A cache format with its options, as a user names it: `rotate2:recent=64,sinks=20,clip=0.8`.
/// Grammar: NAME [':' KEY '=' VALUE (',' KEY '=' VALUE)*]; names and keys are [a-z0-9_]+, values are free of ',' and ':'.
struct KvSpec {
  std::string format = "bf16";
  std::map<std::string, std::string> options;  ///< only those given; a format's own defaults fill the rest

  /// The same text back, options in alphabetical order.
  std::string to_string() const;
  bool operator==(const KvSpec&) const = default;
};

/// Reads one spec. @throws Error{kUser} naming the text and what was expected where.
KvSpec parse_kv_spec(std::string_view text);

/// Reads SPEC[,SPEC...]: a part with '=' before any ':' continues the options of the spec before it.
/// @throws Error{kUser} as parse_kv_spec, and for an empty list.
std::vector<KvSpec> parse_kv_specs(std::string_view text);

}  // namespace rotunda::kv
