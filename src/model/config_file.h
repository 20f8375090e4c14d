#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace rotunda::model {

/// One JSON object of a checkpoint's configuration, read key by key. Every reader throws Error{kUser} with file, key, got and
/// expected where the value has another type or lies outside its range. A key that holds null counts as absent; where a
/// fallback is given it stands for an absent key, else an absent key is an error too.
class ConfigFile {
 public:
  /// @throws Error{kWorld} if the file cannot be read, Error{kUser} where it is no JSON object.
  static ConfigFile open(const std::filesystem::path& path);
  /// The same for text in memory; `origin` stands for the path in messages.
  static ConfigFile parse(std::string_view text, const std::string& origin);

  bool has(const std::string& key) const;         ///< there and not null
  bool holds_null(const std::string& key) const;  ///< there and null
  std::vector<std::string> keys() const;

  int64_t integer(const std::string& key, int64_t min, int64_t max, std::optional<int64_t> fallback = {}) const;
  /// A finite number above 0.
  double positive(const std::string& key, std::optional<double> fallback = {}) const;
  double number(const std::string& key, std::optional<double> fallback = {}) const;
  bool flag(const std::string& key, std::optional<bool> fallback = {}) const;
  std::string text(const std::string& key, std::optional<std::string> fallback = {}) const;
  std::vector<std::string> texts(const std::string& key) const;
  /// One whole number or a list of them, each from 0 to `max`; empty for an absent key.
  std::vector<int64_t> ids(const std::string& key, int64_t max) const;
  ConfigFile object(const std::string& key) const;
  bool is_object(const std::string& key) const;

  /// "FILE: KEY", for messages about a value that is of the right type and still wrong.
  std::string where(const std::string& key) const;
  const std::string& origin() const { return origin_; }

 private:
  ConfigFile(std::string origin, std::string prefix, std::shared_ptr<const nlohmann::json> object);
  const nlohmann::json* find(const std::string& key) const;  // null where absent or null
  [[noreturn]] void fail(const std::string& key, const std::string& expected) const;

  std::string origin_;
  std::string prefix_;  // "rope_scaling." for an object in the file
  std::shared_ptr<const nlohmann::json> object_;
};

/// A checkpoint's folder, its configuration read.
struct ModelFolder {
  std::filesystem::path dir;
  ConfigFile config;                            ///< config.json
  std::optional<ConfigFile> generation_config;  ///< generation_config.json, where there is one

  /// @throws Error{kUser} where `dir` is no folder, and as ConfigFile::open.
  static ModelFolder open(const std::filesystem::path& dir);
};

}  // namespace rotunda::model
