#pragma once

#include <cstdint>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

namespace rotunda::io::tokenizer {

/// A value in a JSON file together with where it stands, so that every complaint names file and part.
/// It refers to the document, which must outlive it.
class JsonRef {
 public:
  JsonRef(const nlohmann::json& value, std::string where) : value_(&value), where_(std::move(where)) {}

  const nlohmann::json& value() const { return *value_; }
  const std::string& where() const { return where_; }  ///< "tokenizer.json: model.vocab"

  /// Whether this is an object with a `key` that is not null.
  bool has(const char* key) const;
  /// The member `key`. @throws Error{kUser} where this is not an object or has no such member, or a null one.
  JsonRef at(const char* key) const;
  /// The members of an array. @throws Error{kUser} where this is none.
  std::vector<JsonRef> items() const;

  /// @throws Error{kUser} where the value has another type (each of the four).
  const std::string& as_string() const;
  bool as_bool() const;
  int64_t as_int() const;
  double as_number() const;

  bool bool_or(const char* key, bool otherwise) const { return has(key) ? at(key).as_bool() : otherwise; }
  std::string string_or(const char* key, const std::string& otherwise) const {
    return has(key) ? at(key).as_string() : otherwise;
  }

  /// Throws Error{kUser} "<where>: <problem>".
  [[noreturn]] void fail(const std::string& problem) const;

 private:
  const nlohmann::json* value_;
  std::string where_;
};

/// The whole of a file. @throws Error{kWorld} where it cannot be read, Error{kUser} beyond `max_bytes`.
std::string read_file(const std::filesystem::path& path, uintmax_t max_bytes);

/// A parsed JSON file. @throws Error{kUser} naming the file where it is no JSON (or no UTF-8) or nests deeper than 64.
nlohmann::json parse_json_file(const std::filesystem::path& path);

/// As parse_json_file, of a text at hand; `name` stands for the file in messages.
nlohmann::json parse_json(const std::string& text, const std::string& name);

}  // namespace rotunda::io::tokenizer
