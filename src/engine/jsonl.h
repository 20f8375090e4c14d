#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <vector>

namespace rotunda::engine {

/// One line of a JSONL file, knowing where it stands for error messages.
class JsonlLine {
 public:
  JsonlLine(std::string where, const nlohmann::json& object);

  const std::string& where() const { return where_; }  ///< "file:line"
  bool has(const std::string& key) const;
  /// @throws Error{kUser} naming file, line and key where it is absent or of another type; so do the others.
  std::string text(const std::string& key) const;
  std::vector<std::string> texts(const std::string& key) const;
  int64_t whole_number(const std::string& key) const;

 private:
  const nlohmann::json& at(const std::string& key) const;

  std::string where_;
  std::shared_ptr<const nlohmann::json> object_;
};

/// The objects of a JSONL file, blank lines left out.
/// @param limit  at most so many; 0: all
/// @throws Error{kWorld} where the file cannot be read; Error{kUser} naming file and line for what is not an object, and for
///   a file without any.
std::vector<JsonlLine> read_jsonl(const std::filesystem::path& path, int64_t limit);

}  // namespace rotunda::engine
