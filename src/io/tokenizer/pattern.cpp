#include "io/tokenizer/pattern.h"

#include "base/check.h"
#include "io/tokenizer/utf8.h"

namespace rotunda::io::tokenizer {

Finder find_text(std::string wanted) {
  ROTUNDA_ASSERT(!wanted.empty());
  return [wanted = std::move(wanted)](std::string_view text) {
    std::vector<Span> spans;
    size_t covered = 0;
    for (size_t p = text.find(wanted); p != std::string_view::npos; p = text.find(wanted, covered)) {
      if (p > covered) spans.push_back({covered, p, false});
      spans.push_back({p, p + wanted.size(), true});
      covered = p + wanted.size();
    }
    if (covered < text.size() || text.empty()) spans.push_back({covered, text.size(), false});
    return spans;
  };
}

Finder find_chars(bool (*is_match)(char32_t)) {
  return [is_match](std::string_view text) {
    std::vector<Span> spans;
    size_t covered = 0;
    for (size_t pos = 0; pos < text.size();) {
      const CodePoint cp = code_point_at(text, pos);
      if (is_match(cp.value)) {
        if (covered < pos) spans.push_back({covered, pos, false});
        covered = pos + cp.size_bytes;
        spans.push_back({pos, covered, true});
      }
      pos += cp.size_bytes;
    }
    if (covered < text.size() || text.empty()) spans.push_back({covered, text.size(), false});
    return spans;
  };
}

Finder read_pattern(const JsonRef& json) {
  if (json.has("String")) {
    const JsonRef text = json.at("String");
    if (text.as_string().empty()) text.fail("the pattern is empty");
    return find_text(text.as_string());
  }
  if (json.has("Regex")) {
    const JsonRef text = json.at("Regex");
    return [regex = Regex(text.as_string(), text.where())](std::string_view t) { return regex.find_all(t); };
  }
  json.fail("expected {\"String\": ...} or {\"Regex\": ...}");
}

}  // namespace rotunda::io::tokenizer
