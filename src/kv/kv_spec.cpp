#include "kv/kv_spec.h"

#include <algorithm>

#include "base/check.h"

namespace rotunda::kv {

namespace {

bool is_name(std::string_view text) {
  return !text.empty() && std::all_of(text.begin(), text.end(), [](char c) {
    return (c >= 'a' && c <= 'z') || (c >= '0' && c <= '9') || c == '_';
  });
}

void add_option(KvSpec& spec, std::string_view part, std::string_view whole) {
  const size_t equals = part.find('=');
  ROTUNDA_CHECK(equals != std::string_view::npos, "kv spec '", whole, "': got '", part, "', expected KEY=VALUE");
  const std::string_view key = part.substr(0, equals);
  const std::string_view value = part.substr(equals + 1);
  ROTUNDA_CHECK(is_name(key), "kv spec '", whole, "': option name '", key, "', expected letters a-z, digits and '_'");
  ROTUNDA_CHECK(!value.empty() && value.find_first_of(":= \t") == std::string_view::npos, "kv spec '", whole, "': option ", key,
                " has the value '", value, "', expected one without blanks, ':' and '='");
  const bool added = spec.options.emplace(key, value).second;
  ROTUNDA_CHECK(added, "kv spec '", whole, "': option ", key, " is given twice");
}

}  // namespace

std::string KvSpec::to_string() const {
  std::string text = format;
  char separator = ':';
  for (const auto& [key, value] : options) {
    text += separator + key + "=" + value;
    separator = ',';
  }
  return text;
}

std::vector<KvSpec> parse_kv_specs(std::string_view text) {
  std::vector<KvSpec> specs;
  size_t begin = 0;
  while (begin <= text.size()) {
    const size_t end = std::min(text.find(',', begin), text.size());
    std::string_view part = text.substr(begin, end - begin);
    begin = end + 1;
    const size_t colon = part.find(':');
    const bool continues = colon == std::string_view::npos && part.find('=') != std::string_view::npos;
    if (continues) {
      ROTUNDA_CHECK(!specs.empty(), "kv spec '", text, "': got '", part, "', expected a format name first");
      add_option(specs.back(), part, text);
      continue;
    }
    KvSpec spec;
    spec.format = part.substr(0, colon);
    ROTUNDA_CHECK(is_name(spec.format), "kv spec '", text, "': format name '", spec.format, "', expected NAME[:KEY=VALUE,...]");
    if (colon != std::string_view::npos) add_option(spec, part.substr(colon + 1), text);
    specs.push_back(std::move(spec));
  }
  return specs;
}

KvSpec parse_kv_spec(std::string_view text) {
  std::vector<KvSpec> specs = parse_kv_specs(text);
  ROTUNDA_CHECK(specs.size() == 1, "kv spec '", text, "': got ", specs.size(), " formats, expected one");
  return specs.front();
}

}  // namespace rotunda::kv
