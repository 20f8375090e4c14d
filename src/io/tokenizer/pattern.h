#pragma once

#include <functional>
#include <string_view>
#include <vector>

#include "io/tokenizer/json_reader.h"
#include "io/tokenizer/regex.h"

namespace rotunda::io::tokenizer {

/// Cuts a text into matches and what lies between; together the spans cover it, and an empty text gives one empty span.
using Finder = std::function<std::vector<Span>(std::string_view)>;

/// {"String": "..."} or {"Regex": "..."}. @throws Error{kUser} for anything else, or a bad pattern.
Finder read_pattern(const JsonRef& json);
/// Every character of which `is_match` holds, one span each.
Finder find_chars(bool (*is_match)(char32_t));
/// Every place where `text` stands, left to right without overlap.
Finder find_text(std::string text);

}  // namespace rotunda::io::tokenizer
