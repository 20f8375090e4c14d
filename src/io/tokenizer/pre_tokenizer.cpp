#include <algorithm>

#include "base/check.h"
#include "io/tokenizer/pattern.h"
#include "io/tokenizer/pipeline.h"
#include "io/tokenizer/utf8.h"

namespace rotunda::io::tokenizer {
namespace {

// GPT-2's words, what ByteLevel with use_regex cuts at.
constexpr std::string_view kGpt2Words =
    R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";

enum class Behavior { kRemoved, kIsolated, kContiguous, kMergedWithPrevious, kMergedWithNext };

Behavior read_behavior(const JsonRef& json) {
  const std::string& name = json.as_string();
  if (name == "Removed") return Behavior::kRemoved;
  if (name == "Isolated") return Behavior::kIsolated;
  if (name == "Contiguous") return Behavior::kContiguous;
  if (name == "MergedWithPrevious") return Behavior::kMergedWithPrevious;
  if (name == "MergedWithNext") return Behavior::kMergedWithNext;
  json.fail(concat("behavior \"", name.substr(0, 80), "\" is not supported"));
}

// What becomes of the matches. In the result is_match marks what is thrown away.
std::vector<Span> arrange(std::vector<Span> spans, Behavior behavior) {
  if (behavior == Behavior::kRemoved) return spans;
  std::vector<Span> out;
  out.reserve(spans.size());
  bool previous = false;
  if (behavior == Behavior::kMergedWithNext) std::reverse(spans.begin(), spans.end());
  for (const Span& span : spans) {
    bool join = false;
    if (behavior == Behavior::kContiguous) join = span.is_match == previous;
    if (behavior == Behavior::kMergedWithPrevious || behavior == Behavior::kMergedWithNext) join = span.is_match && !previous;
    if (join && !out.empty()) {
      if (behavior == Behavior::kMergedWithNext) {
        out.back().begin = span.begin;
      } else {
        out.back().end = span.end;
      }
    } else {
      out.push_back({span.begin, span.end, false});
    }
    previous = span.is_match;
  }
  if (behavior == Behavior::kMergedWithNext) std::reverse(out.begin(), out.end());
  return out;
}

void split_piece(const Piece& piece, const Finder& find, Behavior behavior, bool invert, std::vector<Piece>& out) {
  std::vector<Span> spans = find(piece.text);
  if (invert) {
    for (Span& span : spans) span.is_match = !span.is_match;
  }
  for (const Span& span : arrange(std::move(spans), behavior)) {
    if (span.is_match || span.begin == span.end) continue;
    out.push_back({piece.text.substr(span.begin, span.end - span.begin), piece.at_start && span.begin == 0});
  }
}

PreTokenizer split(Finder find, Behavior behavior, bool invert) {
  return [find = std::move(find), behavior, invert](std::vector<Piece> pieces) {
    std::vector<Piece> out;
    for (const Piece& piece : pieces) split_piece(piece, find, behavior, invert, out);
    return out;
  };
}

PreTokenizer byte_level(bool add_prefix_space, bool use_regex) {
  const Regex words(kGpt2Words, "built-in");
  const Finder find = [words](std::string_view text) { return words.find_all(text); };
  return [find, add_prefix_space, use_regex](std::vector<Piece> pieces) {
    std::vector<Piece> out;
    for (Piece& piece : pieces) {
      if (add_prefix_space && !piece.text.starts_with(' ')) piece.text.insert(0, 1, ' ');
      if (use_regex) {
        split_piece(piece, find, Behavior::kIsolated, false, out);
      } else {
        out.push_back(std::move(piece));
      }
    }
    for (Piece& piece : out) piece.text = to_byte_chars(piece.text);
    return out;
  };
}

enum class Prepend { kFirst, kAlways, kNever };

PreTokenizer metaspace(std::string replacement, Prepend prepend, bool cut) {
  const Finder blanks = find_text(" ");
  const Finder marks = find_text(replacement);
  return [replacement = std::move(replacement), blanks, marks, prepend, cut](std::vector<Piece> pieces) {
    std::vector<Piece> out;
    for (Piece& piece : pieces) {
      std::string text;
      text.reserve(piece.text.size() + piece.text.size() / 2);
      for (const Span& span : blanks(piece.text)) {
        text += span.is_match ? std::string_view(replacement)
                              : std::string_view(piece.text).substr(span.begin, span.end - span.begin);
      }
      const bool wanted = prepend == Prepend::kAlways || (prepend == Prepend::kFirst && piece.at_start);
      if (wanted && !text.starts_with(replacement)) text.insert(0, replacement);
      piece.text = std::move(text);
      if (cut) {
        split_piece(piece, marks, Behavior::kMergedWithNext, false, out);
      } else {
        out.push_back(std::move(piece));
      }
    }
    return out;
  };
}

PreTokenizer read_metaspace(const JsonRef& json) {
  const std::string replacement = json.string_or("replacement", "\xE2\x96\x81");
  if (replacement.empty() || code_point_at(replacement, 0).size_bytes != replacement.size()) {
    json.at("replacement").fail("expected one character");
  }
  // Older files say add_prefix_space instead of prepend_scheme.
  std::string scheme = json.bool_or("add_prefix_space", true) ? "always" : "never";
  if (json.has("prepend_scheme")) {
    const JsonRef given = json.at("prepend_scheme");
    if (json.has("add_prefix_space") && scheme == "never" && given.as_string() != "never") {
      given.fail(concat("got \"", given.as_string().substr(0, 80), "\" beside add_prefix_space false"));
    }
    scheme = given.as_string();
  }
  const bool cut = json.bool_or("split", true);
  if (scheme == "first") return metaspace(replacement, Prepend::kFirst, cut);
  if (scheme == "always") return metaspace(replacement, Prepend::kAlways, cut);
  if (scheme == "never") return metaspace(replacement, Prepend::kNever, cut);
  json.at("prepend_scheme").fail(concat("got \"", scheme.substr(0, 80), "\", expected first, always or never"));
}

}  // namespace

PreTokenizer read_pre_tokenizer(const JsonRef& json, const bool* byte_level_prefix_space) {
  const std::string& type = json.at("type").as_string();
  if (type == "Sequence") {
    std::vector<PreTokenizer> steps;
    for (const JsonRef& step : json.at("pretokenizers").items()) steps.push_back(read_pre_tokenizer(step, nullptr));
    return [steps = std::move(steps)](std::vector<Piece> pieces) {
      for (const PreTokenizer& step : steps) pieces = step(std::move(pieces));
      return pieces;
    };
  }
  if (type == "Split") {
    return split(read_pattern(json.at("pattern")), read_behavior(json.at("behavior")), json.bool_or("invert", false));
  }
  if (type == "ByteLevel") {
    bool add_prefix_space = json.bool_or("add_prefix_space", true);
    if (byte_level_prefix_space != nullptr) add_prefix_space = *byte_level_prefix_space;
    return byte_level(add_prefix_space, json.bool_or("use_regex", true));
  }
  if (type == "Digits") {
    return split(find_chars(&is_numeric),
                 json.bool_or("individual_digits", false) ? Behavior::kIsolated : Behavior::kContiguous, false);
  }
  if (type == "Punctuation") {
    return split(find_chars(&is_punctuation),
                 json.has("behavior") ? read_behavior(json.at("behavior")) : Behavior::kIsolated, false);
  }
  if (type == "Whitespace") {
    const Regex words = Regex::from_pcre2(
        R"([\p{Alphabetic}\p{M}\p{Nd}\p{Pc}\x{200c}\x{200d}]+|[^\p{Alphabetic}\p{M}\p{Nd}\p{Pc}\x{200c}\x{200d}\x{9}-\x{d}\x{20}\x{85}\x{a0}\x{1680}\x{2000}-\x{200a}\x{2028}\x{2029}\x{202f}\x{205f}\x{3000}]+)");
    return split([words](std::string_view text) { return words.find_all(text); }, Behavior::kRemoved, true);
  }
  if (type == "WhitespaceSplit") return split(find_chars(&is_white_space), Behavior::kRemoved, false);
  if (type == "Metaspace") return read_metaspace(json);
  json.fail(concat("pre-tokenizer \"", type.substr(0, 80), "\" is not supported"));
}

}  // namespace rotunda::io::tokenizer
