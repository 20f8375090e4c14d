#include "base/check.h"
#include "io/tokenizer/pattern.h"
#include "io/tokenizer/pipeline.h"
#include "io/tokenizer/utf8.h"

namespace rotunda::io::tokenizer {
namespace {

Normalizer normal_form(NormalForm form) {
  return [form](std::string text) { return normalize(text, form); };
}

Normalizer replace(Finder find, std::string content) {
  return [find = std::move(find), content = std::move(content)](std::string text) {
    std::string out;
    out.reserve(text.size());
    for (const Span& span : find(text)) {
      if (span.is_match) {
        out += content;
      } else {
        out.append(text, span.begin, span.end - span.begin);
      }
    }
    return out;
  };
}

std::string strip(std::string_view text, bool left, bool right) {
  while (left && !text.empty()) {
    const CodePoint cp = code_point_at(text, 0);
    if (!is_white_space(cp.value)) break;
    text.remove_prefix(cp.size_bytes);
  }
  while (right && !text.empty()) {
    const CodePoint cp = code_point_before(text, text.size());
    if (!is_white_space(cp.value)) break;
    text.remove_suffix(cp.size_bytes);
  }
  return std::string(text);
}

}  // namespace

Normalizer read_normalizer(const JsonRef& json) {
  const std::string& type = json.at("type").as_string();
  if (type == "Sequence") {
    std::vector<Normalizer> steps;
    for (const JsonRef& step : json.at("normalizers").items()) steps.push_back(read_normalizer(step));
    return [steps = std::move(steps)](std::string text) {
      for (const Normalizer& step : steps) text = step(std::move(text));
      return text;
    };
  }
  if (type == "Prepend") {
    return [prefix = json.at("prepend").as_string()](std::string text) {
      if (!text.empty()) text.insert(0, prefix);
      return text;
    };
  }
  if (type == "Replace") return replace(read_pattern(json.at("pattern")), json.at("content").as_string());
  if (type == "NFC") return normal_form(NormalForm::kNfc);
  if (type == "NFD") return normal_form(NormalForm::kNfd);
  if (type == "NFKC") return normal_form(NormalForm::kNfkc);
  if (type == "NFKD") return normal_form(NormalForm::kNfkd);
  if (type == "Lowercase") return [](std::string text) { return lowercase(text); };
  if (type == "Strip") {
    const bool left = json.at("strip_left").as_bool();
    const bool right = json.at("strip_right").as_bool();
    return [left, right](std::string text) { return strip(text, left, right); };
  }
  json.fail(concat("normalizer \"", type.substr(0, 80), "\" is not supported"));
}

}  // namespace rotunda::io::tokenizer
