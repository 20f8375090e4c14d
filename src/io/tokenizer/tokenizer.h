#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace rotunda::io {

/// Text to token ids and back, with the same ids as the Hugging Face tokenizer of the same folder.
class Tokenizer {
 public:
  virtual ~Tokenizer() = default;

  /// @param add_special with the tokens that the checkpoint puts around a text (usually BOS in front)
  /// Added tokens written out in the text (such as "</s>") become their ids, as in Hugging Face. Invalid UTF-8 is replaced
  /// by U+FFFD, one per maximal ill-formed run, as Python's errors="replace" does.
  virtual std::vector<int64_t> encode(std::string_view text, bool add_special) const = 0;
  /// The text of the ids; special tokens are left out where `skip_special`.
  virtual std::string decode(const std::vector<int64_t>& ids, bool skip_special) const = 0;
  virtual int64_t vocab_size() const = 0;  ///< largest id + 1
  virtual std::optional<int64_t> bos_id() const = 0;
  virtual std::optional<int64_t> eos_id() const = 0;
};

/// Streams a growing list of ids as text, special tokens left out: holds back bytes that do not end a UTF-8 character
/// yet, and blanks that a clean-up may still take away. All parts together are decode(ids, true), except that a broken run
/// of byte tokens keeps the characters that were whole before it broke.
class StreamDecoder {
 public:
  explicit StreamDecoder(const Tokenizer& tokenizer) : tokenizer_(tokenizer) {}
  /// The text that `id` adds, complete characters only; empty where it has to wait.
  std::string push(int64_t id);
  /// What is held back, with U+FFFD for an unfinished character. The decoder is as new afterwards.
  std::string finish();

 private:
  const Tokenizer& tokenizer_;
  std::string advance(std::string_view settled);

  std::vector<int64_t> ids_;  // since the last point where the text was cut
  std::string shown_;         // what was given out of the text of ids_
};

/// Loads `tokenizer.json`, or else `tokenizer.model` (with `tokenizer_config.json` beside it for special tokens).
/// @throws Error{kUser} naming file and part for anything unsupported or damaged, or where neither is there.
std::unique_ptr<const Tokenizer> load_tokenizer(const std::filesystem::path& model_dir);

}  // namespace rotunda::io
