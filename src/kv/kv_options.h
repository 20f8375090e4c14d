#pragma once

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <string>
#include <utility>
#include <vector>

#include "base/check.h"
#include "kv/kv_format.h"
#include "kv/kv_spec.h"

namespace rotunda::kv {

/// Among which tokens sinks are chosen by the entries of a layer's input.
enum class SinkSelect {
  kPrompt,   ///< among the tokens of the prompt (as published)
  kRunning,  ///< among all tokens so far
};

/// What a packed format keeps in 16 bits beside its pages.
struct ExactOptions {
  int recent = 64;  ///< newest tokens; 0: none
  int sinks = 20;   ///< largest entries of a layer's input that choose tokens to keep; 0: none
  SinkSelect sink_select = SinkSelect::kPrompt;
  int n_first = 0;  ///< first tokens of a sequence, kept whatever their entries are
  /// Tokens that are packed together, because they share a scale: 1, 16 or 32. They begin at a multiple of it and stay in 16 bits until
  /// all of them are older than the `recent` newest.
  int pack_group = 1;

  /// Tokens that the window holds at most.
  int64_t longest_window() const { return int64_t{recent} + pack_group - 1; }
  /// How many tokens of a sequence of `kv_len` are packed.
  int64_t packed_len(int64_t kv_len) const { return std::max<int64_t>(0, kv_len - recent) / pack_group * pack_group; }
};

/// The value of option `key`, which `spec` has. @throws Error{kUser} naming format, option, got and expected where it is
/// no number from `low` to `high`.
int parse_number(const KvSpec& spec, const std::string& key, int low, int high);
float parse_number(const KvSpec& spec, const std::string& key, float low, float high);

/// The same for a value that has a name. @throws Error{kUser} listing the names.
template <typename Value>
Value parse_choice(const KvSpec& spec, const std::string& key,
                   std::initializer_list<std::pair<const char*, Value>> choices) {
  const std::string& text = spec.options.at(key);
  std::string known;
  for (const auto& [name, value] : choices) {
    if (text == name) return value;
    known += (known.empty() ? "" : ", ") + std::string(name);
  }
  throw_user_error(concat(spec.format, ": option ", key, "=", text, ", expected one of: ", known));
}

/// Reads `recent`, `first`, `sinks` and `sink_select`. @return whether `key` is one of them
bool parse_exact_option(const KvSpec& spec, const std::string& key, ExactOptions& exact);
/// Name, default and help of these four.
std::vector<KvOption> describe_exact_options(const ExactOptions& defaults);

}  // namespace rotunda::kv
