#include "kv/kv_options.h"

#include <charconv>

namespace rotunda::kv {

namespace {

template <typename Number>
Number number(const KvSpec& spec, const std::string& key, Number low, Number high) {
  const std::string& text = spec.options.at(key);
  Number value{};
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  ROTUNDA_CHECK(error == std::errc() && end == text.data() + text.size() && value >= low && value <= high, spec.format,
                ": option ", key, "=", text, ", expected a number from ", low, " to ", high);
  return value;
}

}  // namespace

int parse_number(const KvSpec& spec, const std::string& key, int low, int high) {
  return number<int>(spec, key, low, high);
}

float parse_number(const KvSpec& spec, const std::string& key, float low, float high) {
  return number<float>(spec, key, low, high);
}

bool parse_exact_option(const KvSpec& spec, const std::string& key, ExactOptions& exact) {
  if (key == "recent") {
    exact.recent = parse_number(spec, key, 0, 1 << 20);
  } else if (key == "first") {
    exact.n_first = parse_number(spec, key, 0, 4096);
  } else if (key == "sinks") {
    exact.sinks = parse_number(spec, key, 0, 4096);
  } else if (key == "sink_select") {
    exact.sink_select =
        parse_choice<SinkSelect>(spec, key, {{"prompt", SinkSelect::kPrompt}, {"running", SinkSelect::kRunning}});
  } else {
    return false;
  }
  return true;
}

std::vector<KvOption> describe_exact_options(const ExactOptions& defaults) {
  return {
      {"recent", std::to_string(defaults.recent), "newest tokens kept in 16 bits, 0 or more"},
      {"first", std::to_string(defaults.n_first), "first tokens of a sequence kept in 16 bits, 0 or more"},
      {"sinks", std::to_string(defaults.sinks),
       "largest entries of a layer's input; their tokens stay in 16 bits too, 0 or more"},
      {"sink_select", "prompt", "tokens that may be sinks: prompt or running (all so far)"},
  };
}

}  // namespace rotunda::kv
