#include <charconv>

#include "base/check.h"
#include "io/tokenizer/pattern.h"
#include "io/tokenizer/pipeline.h"
#include "io/tokenizer/utf8.h"

namespace rotunda::io::tokenizer {
namespace {

using Tokens = std::vector<std::string>;

std::string joined(const Tokens& tokens) {
  std::string out;
  for (const std::string& token : tokens) out += token;
  return out;
}

Tokens decode_byte_level(Tokens tokens) {
  std::string bytes;
  for (const std::string& token : tokens) append_from_byte_chars(token, bytes);
  return {replace_ill_formed(bytes)};
}

// Runs of "<0xE2>" tokens become their characters; a run that is not UTF-8 as a whole, one U+FFFD per byte.
Tokens decode_byte_fallback(Tokens tokens) {
  Tokens out;
  std::string run;
  const auto flush = [&] {
    if (run.empty()) return;
    if (is_valid_utf8(run)) {
      out.push_back(run);
    } else {
      for (size_t i = 0; i < run.size(); ++i) out.emplace_back("\xEF\xBF\xBD");
    }
    run.clear();
  };
  for (std::string& token : tokens) {
    unsigned byte = 0;
    if (token.size() == 6 && token.starts_with("<0x") && token.ends_with('>')) {
      const auto [end, error] = std::from_chars(token.data() + 3, token.data() + 5, byte, 16);
      if (error == std::errc() && end == token.data() + 5) {
        run += static_cast<char>(byte);
        continue;
      }
    }
    flush();
    out.push_back(std::move(token));
  }
  flush();
  return out;
}

TokenDecoder metaspace(std::string replacement, bool drop_first) {
  return [find = find_text(std::move(replacement)), drop_first](Tokens tokens) {
    for (size_t i = 0; i < tokens.size(); ++i) {
      std::string out;
      for (const Span& span : find(tokens[i])) {
        if (!span.is_match) {
          out.append(tokens[i], span.begin, span.end - span.begin);
        } else if (i > 0 || !drop_first) {
          out += ' ';
        }
      }
      tokens[i] = std::move(out);
    }
    return tokens;
  };
}

TokenDecoder strip(std::string content, int64_t start, int64_t stop) {
  return [content = std::move(content), start, stop](Tokens tokens) {
    for (std::string& token : tokens) {
      std::string_view rest = token;
      for (int64_t i = 0; i < start && rest.starts_with(content); ++i) rest.remove_prefix(content.size());
      for (int64_t i = 0; i < stop && rest.ends_with(content); ++i) rest.remove_suffix(content.size());
      token = std::string(rest);
    }
    return tokens;
  };
}

}  // namespace

TokenDecoder read_decoder(const JsonRef& json) {
  const std::string& type = json.at("type").as_string();
  if (type == "Sequence") {
    std::vector<TokenDecoder> steps;
    for (const JsonRef& step : json.at("decoders").items()) steps.push_back(read_decoder(step));
    return [steps = std::move(steps)](Tokens tokens) {
      for (const TokenDecoder& step : steps) tokens = step(std::move(tokens));
      return tokens;
    };
  }
  if (type == "ByteLevel") return &decode_byte_level;
  if (type == "ByteFallback") return &decode_byte_fallback;
  if (type == "Fuse") return [](Tokens tokens) { return Tokens{joined(tokens)}; };
  if (type == "Metaspace") {
    const bool never = json.has("prepend_scheme") ? json.at("prepend_scheme").as_string() == "never"
                                                  : !json.bool_or("add_prefix_space", true);
    const std::string replacement = json.string_or("replacement", "\xE2\x96\x81");
    if (replacement.empty()) json.at("replacement").fail("expected one character");
    return metaspace(replacement, !never);
  }
  if (type == "Replace") {
    return [find = read_pattern(json.at("pattern")), content = json.at("content").as_string()](Tokens tokens) {
      for (std::string& token : tokens) {
        std::string out;
        for (const Span& span : find(token)) {
          if (span.is_match) {
            out += content;
          } else {
            out.append(token, span.begin, span.end - span.begin);
          }
        }
        token = std::move(out);
      }
      return tokens;
    };
  }
  if (type == "Strip") {
    const std::string content = json.at("content").as_string();
    if (content.empty() || code_point_at(content, 0).size_bytes != content.size()) {
      json.at("content").fail("expected one character");
    }
    return strip(content, json.at("start").as_int(), json.at("stop").as_int());
  }
  json.fail(concat("decoder \"", type.substr(0, 80), "\" is not supported"));
}

}  // namespace rotunda::io::tokenizer
