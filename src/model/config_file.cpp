#include "model/config_file.h"

#include <cmath>
#include <nlohmann/json.hpp>
#include <utility>

#include "base/check.h"
#include "io/json_file.h"

namespace rotunda::model {

namespace {

using nlohmann::json;

// The value as it stands in the file, short enough for one line of message.
std::string shown(const json& value) {
  std::string text = value.dump(-1, ' ', false, json::error_handler_t::replace);
  constexpr size_t kMaxShown = 60;
  if (text.size() > kMaxShown) {
    text.resize(kMaxShown);
    text += "...";
  }
  return text;
}

// A whole number, also one written as 4096.0; nothing where `value` is none or does not fit.
std::optional<int64_t> whole_number(const json& value) {
  if (value.is_number_unsigned()) {
    const uint64_t x = value.get<uint64_t>();
    return x <= static_cast<uint64_t>(INT64_MAX) ? std::optional<int64_t>(static_cast<int64_t>(x)) : std::nullopt;
  }
  if (value.is_number_integer()) return value.get<int64_t>();
  if (value.is_number_float()) {
    const double x = value.get<double>();
    constexpr double kExact = 9007199254740992.0;  // 2^53
    if (std::trunc(x) == x && std::abs(x) <= kExact) return static_cast<int64_t>(x);
  }
  return std::nullopt;
}

std::shared_ptr<const json> checked_object(json&& value, const std::string& origin) {
  ROTUNDA_CHECK(value.is_object(), origin, ": holds ", shown(value), ", expected a JSON object");
  return std::make_shared<const json>(std::move(value));
}

}  // namespace

ConfigFile::ConfigFile(std::string origin, std::string prefix, std::shared_ptr<const json> object)
    : origin_(std::move(origin)), prefix_(std::move(prefix)), object_(std::move(object)) {}

ConfigFile ConfigFile::open(const std::filesystem::path& path) {
  return ConfigFile(path.string(), "", checked_object(io::read_json(path), path.string()));
}

ConfigFile ConfigFile::parse(std::string_view text, const std::string& origin) {
  return ConfigFile(origin, "", checked_object(io::parse_json(text, origin), origin));
}

const json* ConfigFile::find(const std::string& key) const {
  const auto it = object_->find(key);
  return it == object_->end() || it->is_null() ? nullptr : &*it;
}

bool ConfigFile::has(const std::string& key) const { return find(key) != nullptr; }

bool ConfigFile::holds_null(const std::string& key) const { return object_->contains(key) && !has(key); }

std::vector<std::string> ConfigFile::keys() const {
  std::vector<std::string> keys;
  for (const auto& item : object_->items()) keys.push_back(item.key());
  return keys;
}

std::string ConfigFile::where(const std::string& key) const { return origin_ + ": " + prefix_ + key; }

void ConfigFile::fail(const std::string& key, const std::string& expected) const {
  const json* value = find(key);
  throw_user_error(value == nullptr ? where(key) + " is missing, expected " + expected
                                    : where(key) + " is " + shown(*value) + ", expected " + expected);
}

int64_t ConfigFile::integer(const std::string& key, int64_t min, int64_t max, std::optional<int64_t> fallback) const {
  const json* value = find(key);
  if (value == nullptr && fallback) return *fallback;
  const std::optional<int64_t> x = value == nullptr ? std::nullopt : whole_number(*value);
  if (!x || *x < min || *x > max) fail(key, concat("a whole number from ", min, " to ", max));
  return *x;
}

double ConfigFile::number(const std::string& key, std::optional<double> fallback) const {
  const json* value = find(key);
  if (value == nullptr && fallback) return *fallback;
  if (value == nullptr || !value->is_number() || !std::isfinite(value->get<double>())) fail(key, "a number");
  return value->get<double>();
}

double ConfigFile::positive(const std::string& key, std::optional<double> fallback) const {
  const double x = number(key, fallback);
  if (!(x > 0.0)) fail(key, "a number above 0");
  return x;
}

bool ConfigFile::flag(const std::string& key, std::optional<bool> fallback) const {
  const json* value = find(key);
  if (value == nullptr && fallback) return *fallback;
  if (value == nullptr || !value->is_boolean()) fail(key, "true or false");
  return value->get<bool>();
}

std::string ConfigFile::text(const std::string& key, std::optional<std::string> fallback) const {
  const json* value = find(key);
  if (value == nullptr && fallback) return *fallback;
  if (value == nullptr || !value->is_string()) fail(key, "a text");
  return value->get<std::string>();
}

std::vector<std::string> ConfigFile::texts(const std::string& key) const {
  const json* value = find(key);
  if (value == nullptr || !value->is_array()) fail(key, "a list of texts");
  std::vector<std::string> texts;
  for (const json& item : *value) {
    if (!item.is_string()) fail(key, "a list of texts");
    texts.push_back(item.get<std::string>());
  }
  return texts;
}

std::vector<int64_t> ConfigFile::ids(const std::string& key, int64_t max) const {
  const json* value = find(key);
  if (value == nullptr) return {};
  const std::string expected = concat("a token id from 0 to ", max, ", or a list of them");
  std::vector<int64_t> ids;
  for (const json& item : value->is_array() ? *value : json::array({*value})) {
    const std::optional<int64_t> id = whole_number(item);
    if (!id || *id < 0 || *id > max) fail(key, expected);
    ids.push_back(*id);
  }
  return ids;
}

bool ConfigFile::is_object(const std::string& key) const {
  const json* value = find(key);
  return value != nullptr && value->is_object();
}

ConfigFile ConfigFile::object(const std::string& key) const {
  const json* value = find(key);
  if (value == nullptr || !value->is_object()) fail(key, "an object");
  return ConfigFile(origin_, prefix_ + key + ".", std::shared_ptr<const json>(object_, value));
}

ModelFolder ModelFolder::open(const std::filesystem::path& dir) {
  std::error_code error;
  ROTUNDA_CHECK(std::filesystem::is_directory(dir, error), dir.string(),
                ": not a folder, expected a Hugging Face model folder");
  const std::filesystem::path generation = dir / "generation_config.json";
  std::optional<ConfigFile> generation_config;
  if (std::filesystem::exists(generation, error)) generation_config = ConfigFile::open(generation);
  return ModelFolder{dir, ConfigFile::open(dir / "config.json"), std::move(generation_config)};
}

}  // namespace rotunda::model
