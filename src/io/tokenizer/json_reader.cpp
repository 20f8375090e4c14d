#include "io/tokenizer/json_reader.h"

#include <fstream>

#include "base/check.h"

namespace rotunda::io::tokenizer {
namespace {

constexpr uintmax_t kMaxJsonBytes = uintmax_t{512} << 20;
constexpr int kMaxDepth = 64;

}  // namespace

void JsonRef::fail(const std::string& problem) const { throw_user_error(where_ + ": " + problem); }

bool JsonRef::has(const char* key) const {
  if (!value_->is_object()) return false;
  const auto it = value_->find(key);
  return it != value_->end() && !it->is_null();
}

JsonRef JsonRef::at(const char* key) const {
  if (!value_->is_object()) fail(concat("got ", value_->type_name(), ", expected an object"));
  const auto it = value_->find(key);
  if (it == value_->end() || it->is_null()) fail(concat("\"", key, "\" is missing"));
  return {*it, where_ + (where_.ends_with(':') ? " " : ".") + key};
}

std::vector<JsonRef> JsonRef::items() const {
  if (!value_->is_array()) fail(concat("got ", value_->type_name(), ", expected an array"));
  std::vector<JsonRef> out;
  out.reserve(value_->size());
  for (size_t i = 0; i < value_->size(); ++i) out.emplace_back((*value_)[i], concat(where_, '[', i, ']'));
  return out;
}

const std::string& JsonRef::as_string() const {
  if (!value_->is_string()) fail(concat("got ", value_->type_name(), ", expected a string"));
  return value_->get_ref<const std::string&>();
}

bool JsonRef::as_bool() const {
  if (!value_->is_boolean()) fail(concat("got ", value_->type_name(), ", expected true or false"));
  return value_->get<bool>();
}

int64_t JsonRef::as_int() const {
  if (!value_->is_number_integer()) fail(concat("got ", value_->type_name(), ", expected an integer"));
  if (value_->is_number_unsigned() && value_->get<uint64_t>() > static_cast<uint64_t>(INT64_MAX)) {
    fail("the integer does not fit 64 bits");
  }
  return value_->get<int64_t>();
}

double JsonRef::as_number() const {
  if (!value_->is_number()) fail(concat("got ", value_->type_name(), ", expected a number"));
  return value_->get<double>();
}

std::string read_file(const std::filesystem::path& path, uintmax_t max_bytes) {
  std::error_code error;
  const uintmax_t size = std::filesystem::file_size(path, error);
  ROTUNDA_CHECK_WORLD(!error, path.string(), ": ", error.message());
  ROTUNDA_CHECK(size <= max_bytes, path.string(), ": ", size, " bytes, at most ", max_bytes);
  std::ifstream in(path, std::ios::binary);
  ROTUNDA_CHECK_WORLD(in.good(), path.string(), ": cannot be opened for reading");
  std::string bytes(size, '\0');
  in.read(bytes.data(), static_cast<std::streamsize>(size));
  ROTUNDA_CHECK_WORLD(static_cast<uintmax_t>(in.gcount()) == size, path.string(), ": read ", in.gcount(), " of ", size,
                      " bytes");
  return bytes;
}

nlohmann::json parse_json(const std::string& text, const std::string& name) {
  bool too_deep = false;
  const auto watch_depth = [&](int depth, nlohmann::json::parse_event_t, nlohmann::json&) {
    too_deep = too_deep || depth > kMaxDepth;
    // Values below are dropped as they come, so a file of a million brackets builds nothing.
    return depth <= kMaxDepth;
  };
  try {
    nlohmann::json parsed = nlohmann::json::parse(text, watch_depth);
    ROTUNDA_CHECK(!too_deep, name, ": nests deeper than ", kMaxDepth, " levels");
    return parsed;
  } catch (const nlohmann::json::exception& e) {
    // The library's message quotes the text around the fault, which may be long or not printable.
    std::string reason = e.what();
    const size_t quote = reason.find("; last read");
    if (quote != std::string::npos) reason.resize(quote);
    throw_user_error(concat(name, ": not valid JSON: ", reason));
  }
}

nlohmann::json parse_json_file(const std::filesystem::path& path) {
  return parse_json(read_file(path, kMaxJsonBytes), path.string());
}

}  // namespace rotunda::io::tokenizer
