#pragma once

#include <cstddef>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace rotunda::io::tokenizer {

/// A part of a text in bytes, [begin, end), and whether the pattern matched it.
struct Span {
  size_t begin;
  size_t end;
  bool is_match;
};

/// A pattern in the dialect of the Hugging Face tokenizers (Oniguruma, Ruby syntax), run by PCRE2 with its JIT.
/// Safe to use from several threads at once.
class Regex {
 public:
  /// @param where file and part, for the message
  /// @throws Error{kUser} where the pattern is bad or has a construct that PCRE2 would read otherwise.
  Regex(std::string_view pattern, const std::string& where);
  /// A pattern that is already in PCRE2's own dialect.
  static Regex from_pcre2(std::string_view pattern);

  /// Cuts `text` (valid UTF-8) into matches and what lies between; together they cover it. Empty text gives one empty span.
  /// @throws Error{kUser} where a match needs more backtracking or stack than we allow.
  std::vector<Span> find_all(std::string_view text) const;

 private:
  struct Program;
  explicit Regex(std::shared_ptr<const Program> program) : program_(std::move(program)) {}
  std::shared_ptr<const Program> program_;
};

/// The PCRE2 pattern of the same meaning as an Oniguruma one; exposed for its test.
/// @throws Error{kUser} for constructs without a translation.
std::string translate_oniguruma(std::string_view pattern, const std::string& where);

}  // namespace rotunda::io::tokenizer
