#include "engine/jsonl.h"

#include <nlohmann/json.hpp>
#include <string_view>

#include "base/check.h"
#include "engine/session.h"

namespace rotunda::engine {

JsonlLine::JsonlLine(std::string where, const nlohmann::json& object)
    : where_(std::move(where)), object_(std::make_shared<const nlohmann::json>(object)) {}

bool JsonlLine::has(const std::string& key) const { return object_->contains(key); }

const nlohmann::json& JsonlLine::at(const std::string& key) const {
  const auto it = object_->find(key);
  ROTUNDA_CHECK(it != object_->end(), where_, ": key '", key, "' is missing");
  return *it;
}

std::string JsonlLine::text(const std::string& key) const {
  const nlohmann::json& value = at(key);
  ROTUNDA_CHECK(value.is_string(), where_, ": '", key, "' is a ", value.type_name(), ", expected a string");
  return value.get<std::string>();
}

std::vector<std::string> JsonlLine::texts(const std::string& key) const {
  const nlohmann::json& value = at(key);
  ROTUNDA_CHECK(value.is_array(), where_, ": '", key, "' is a ", value.type_name(), ", expected an array of strings");
  std::vector<std::string> texts;
  for (const nlohmann::json& element : value) {
    ROTUNDA_CHECK(element.is_string(), where_, ": '", key, "' holds a ", element.type_name(), ", expected strings");
    texts.push_back(element.get<std::string>());
  }
  return texts;
}

int64_t JsonlLine::whole_number(const std::string& key) const {
  const nlohmann::json& value = at(key);
  ROTUNDA_CHECK(value.is_number_integer(), where_, ": '", key, "' is ", value.dump(), ", expected a whole number");
  return value.get<int64_t>();
}

std::vector<JsonlLine> read_jsonl(const std::filesystem::path& path, int64_t limit) {
  const std::string text = read_text_file(path);
  std::vector<JsonlLine> lines;
  size_t number = 0;
  for (size_t begin = 0; begin < text.size();) {
    const size_t end = std::min(text.find('\n', begin), text.size());
    const std::string_view line = std::string_view(text).substr(begin, end - begin);
    begin = end + 1;
    ++number;
    if (line.find_first_not_of(" \t\r") == std::string_view::npos) continue;
    const std::string where = path.string() + ":" + std::to_string(number);
    const nlohmann::json object = nlohmann::json::parse(line, nullptr, /*allow_exceptions=*/false);
    ROTUNDA_CHECK(!object.is_discarded(), where, ": is not JSON");
    ROTUNDA_CHECK(object.is_object(), where, ": is a ", object.type_name(), ", expected an object");
    lines.emplace_back(where, object);
    if (limit > 0 && static_cast<int64_t>(lines.size()) == limit) break;
  }
  ROTUNDA_CHECK(!lines.empty(), path.string(), ": holds no line, expected JSON objects");
  return lines;
}

}  // namespace rotunda::engine
