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

}  // namespace rotunda::kv
