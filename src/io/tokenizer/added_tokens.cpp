#include "io/tokenizer/added_tokens.h"

namespace rotunda::io::tokenizer {

AddedToken read_added_token(const JsonRef& json) {
  AddedToken token;
  token.content = json.at("content").as_string();
  token.single_word = json.bool_or("single_word", false);
  token.lstrip = json.bool_or("lstrip", false);
  token.rstrip = json.bool_or("rstrip", false);
  token.special = json.bool_or("special", false);
  token.normalized = json.bool_or("normalized", !token.special);
  return token;
}

void StringMatcher::add(std::string_view text, size_t index) {
  if (text.empty()) return;
  starts_[static_cast<unsigned char>(text[0])] = true;
  uint32_t node = 0;
  for (const char c : text) {
    const uint64_t key = uint64_t{node} << 8 | static_cast<unsigned char>(c);
    const auto [it, is_new] = edges_.emplace(key, static_cast<uint32_t>(nodes_.size()));
    if (is_new) nodes_.emplace_back();
    node = it->second;
  }
  if (nodes_[node].index < 0) nodes_[node].index = static_cast<int64_t>(index);
}

bool StringMatcher::find(std::string_view text, size_t from, Hit& hit) const {
  if (empty()) return false;
  for (size_t begin = from; begin < text.size(); ++begin) {
    if (!starts_[static_cast<unsigned char>(text[begin])]) continue;
    uint32_t node = 0;
    bool found = false;
    for (size_t p = begin; p < text.size(); ++p) {
      const auto it = edges_.find(uint64_t{node} << 8 | static_cast<unsigned char>(text[p]));
      if (it == edges_.end()) break;
      node = it->second;
      if (nodes_[node].index >= 0) {
        found = true;
        hit = {begin, p + 1, static_cast<size_t>(nodes_[node].index)};
      }
    }
    if (found) return true;
  }
  return false;
}

}  // namespace rotunda::io::tokenizer
