#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "io/tokenizer/json_reader.h"

namespace rotunda::io::tokenizer {

/// The largest id that a vocabulary may use; more is taken for a damaged file (the largest real ones stay below 2^20).
inline constexpr int64_t kMaxTokenId = (int64_t{1} << 24) - 1;

/// A token that is looked for in the text before the model sees it.
struct AddedToken {
  std::string content;
  int64_t id = -1;
  bool single_word = false;  ///< only where no word character touches it
  bool lstrip = false;       ///< takes the white space before it along
  bool rstrip = false;       ///< takes the white space behind it along
  bool normalized = true;    ///< looked for in the normalized text instead of the raw one
  bool special = false;      ///< left out by decode(skip_special)
};

/// The flags and the content of an added token as Hugging Face writes it; the id stays -1.
AddedToken read_added_token(const JsonRef& json);

/// Finds the longest of a set of strings at the leftmost place.
class StringMatcher {
 public:
  struct Hit {
    size_t begin;
    size_t end;
    size_t index;  ///< the how-manieth string that was added
  };
  /// The first of equal strings wins; an empty one never matches.
  void add(std::string_view text, size_t index);
  bool empty() const { return nodes_.size() == 1; }
  /// The first hit at or behind `from`; false where there is none.
  bool find(std::string_view text, size_t from, Hit& hit) const;

 private:
  struct Node {
    int64_t index = -1;
  };
  std::vector<Node> nodes_{1};
  std::unordered_map<uint64_t, uint32_t> edges_;  // node << 8 | byte
  std::array<bool, 256> starts_{};
};

}  // namespace rotunda::io::tokenizer
