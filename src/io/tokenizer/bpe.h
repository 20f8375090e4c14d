#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include "io/tokenizer/added_tokens.h"
#include "io/tokenizer/json_reader.h"

namespace rotunda::io::tokenizer {

/// Lets a map with string keys be asked with a string_view.
struct StringHash {
  using is_transparent = void;
  size_t operator()(std::string_view s) const { return std::hash<std::string_view>{}(s); }
};
template <typename Value>
using StringMap = std::unordered_map<std::string, Value, StringHash, std::equal_to<>>;

/// From a pair of token ids to the rank of their merge and the id they become. Open addressing: asked per text byte.
class MergeTable {
 public:
  struct Merge {
    int32_t rank;
    int32_t new_id;
  };
  explicit MergeTable(size_t n_merges);
  /// A pair given twice keeps its last merge, as in Hugging Face.
  void insert(int32_t left, int32_t right, Merge merge);
  const Merge* find(int32_t left, int32_t right) const;

 private:
  struct Slot {
    uint64_t key;
    Merge merge;
  };
  size_t slot_of(uint64_t key) const;
  std::vector<Slot> slots_;
};

/// The byte-pair-encoding model of `tokenizer.json` ("model": {"type": "BPE", ...}).
class BpeModel {
 public:
  /// @throws Error{kUser} naming the part: dropout, ids out of range or used twice, merges of or into unknown tokens.
  explicit BpeModel(const JsonRef& model);

  /// Appends the ids of one word (what the pre-tokenizers leave in one piece). Time in n log n of its length.
  void tokenize(std::string_view word, std::vector<int64_t>& ids) const;

  std::optional<int64_t> id_of(std::string_view token) const;
  const std::string* token_of(int64_t id) const;  ///< null for an unknown id
  int64_t n_tokens() const { return static_cast<int64_t>(vocab_.size()); }
  int64_t max_id() const { return max_id_; }  ///< -1 for an empty vocabulary

 private:
  void split_to_symbols(std::string_view word, std::vector<int32_t>& symbols) const;

  StringMap<int32_t> vocab_;
  std::unordered_map<int64_t, const std::string*> tokens_;  // into vocab_'s keys, which do not move
  int64_t max_id_ = -1;
  MergeTable merges_{0};
  std::optional<int32_t> byte_ids_[256];  // "<0x00>" ... where the vocabulary has them
  std::optional<int32_t> unk_id_;
  std::string prefix_;  // continuing_subword_prefix
  std::string suffix_;  // end_of_word_suffix
  bool fuse_unk_ = false;
  bool byte_fallback_ = false;
  bool ignore_merges_ = false;
};

}  // namespace rotunda::io::tokenizer
