#include "kv/kv_spec.h"

#include <algorithm>
#include <charconv>

#include "base/check.h"
#include "kv/kv_registry.h"

namespace rotunda::kv {

namespace {

constexpr std::string_view kBlanks = " \t";
constexpr std::string_view kLayers = "layers";

bool is_name(std::string_view text) {
  return !text.empty() && std::all_of(text.begin(), text.end(), [](char c) {
    return (c >= 'a' && c <= 'z') || (c >= '0' && c <= '9') || c == '_';
  });
}

std::string_view trim(std::string_view text) {
  const size_t first = text.find_first_not_of(kBlanks);
  if (first == std::string_view::npos) return {};
  return text.substr(first, text.find_last_not_of(kBlanks) + 1 - first);
}

std::string join(const std::vector<std::string>& names) {
  std::string text;
  for (const std::string& name : names) text += (text.empty() ? "" : ", ") + name;
  return text;
}

std::string to_string(const std::vector<LayerRange>& layers) {
  std::string text;
  for (const LayerRange& range : layers) {
    text += concat(text.empty() ? "" : ",", range.first);
    if (range.last != range.first) text += concat("-", range.last);
  }
  return text;
}

// Which formats' values go with keys of one, itself too.
std::string values_for(const KvFormat& keys) {
  std::vector<std::string> partners;
  for (const auto& values : kv_registry().all()) {
    const KvSpec key_spec{.format = keys.name(), .options = {}, .parts = {}};
    const KvSpec value_spec{.format = values->name(), .options = {}, .parts = {}};
    if (key_spec == value_spec || keys.with_values(key_spec, value_spec)) partners.push_back(values->name());
  }
  return join(partners);
}

// Reads from left to right; every error names the whole text.
class SpecReader {
 public:
  explicit SpecReader(std::string_view text) : text_(text) {}

  std::vector<KvSpec> read_list() {
    std::vector<KvSpec> specs;
    do {
      specs.push_back(at_layers() ? read_mix() : read_one());
      ROTUNDA_CHECK(place_ == text_.size() || text_[place_] == ',', "kv spec '", text_, "': got '", text_.substr(place_),
                    "', expected 'layers N,... = FORMAT' in front of a ';'");
    } while (take(','));
    return specs;
  }

 private:
  // What comes next, up to a comma or semicolon.
  std::string_view next(size_t place) const {
    const size_t end = std::min(text_.find_first_of(",;", place), text_.size());
    return trim(text_.substr(place, end - place));
  }
  std::string_view take_next() {
    const std::string_view piece = next(place_);
    place_ = std::min(text_.find_first_of(",;", place_), text_.size());
    return piece;
  }
  bool take(char c) {
    if (place_ == text_.size() || text_[place_] != c) return false;
    ++place_;
    return true;
  }

  static bool is_layers(std::string_view piece) {
    return piece.starts_with(kLayers) && piece.size() > kLayers.size() && kBlanks.find(piece[kLayers.size()]) != std::string_view::npos;
  }
  static bool is_side(std::string_view piece, char side) { return piece.size() > 1 && piece[0] == side && piece[1] == '='; }
  bool at_layers() const { return is_layers(next(place_)); }

  KvSpec read_mix() {
    KvSpec mix{.format = kMixFormat, .options = {}, .parts = {}};
    bool rest = false;
    do {
      ROTUNDA_CHECK(!rest, "kv spec '", text_, "': got '", next(place_), "' after the format of the remaining layers, which stands last");
      rest = !at_layers();
      KvSpecPart part;
      if (!rest) part.layers = read_layers();
      part.spec = read_one();
      mix.parts.push_back(std::move(part));
    } while (take(';'));
    return mix;
  }

  // "layers N,N-M,... =".
  std::vector<LayerRange> read_layers() {
    const size_t begin = text_.find(kLayers, place_) + kLayers.size();
    const size_t equals = text_.find('=', begin);
    ROTUNDA_CHECK(equals != std::string_view::npos, "kv spec '", text_, "': got '", next(place_), "', expected layers N,N-M,... = FORMAT");
    std::vector<LayerRange> layers;
    for (size_t place = begin; place <= equals;) {
      const size_t end = std::min(text_.find(',', place), equals);
      layers.push_back(read_range(trim(text_.substr(place, end - place))));
      place = end + 1;
    }
    place_ = equals + 1;
    return layers;
  }

  LayerRange read_range(std::string_view text) const {
    LayerRange range;
    const char* end = text.data() + text.size();
    auto read = std::from_chars(text.data(), end, range.first);
    range.last = range.first;
    if (read.ec == std::errc() && read.ptr != end && *read.ptr == '-') read = std::from_chars(read.ptr + 1, end, range.last);
    ROTUNDA_CHECK(read.ec == std::errc() && read.ptr == end, "kv spec '", text_, "': got '", text,
                  "', expected a layer's number N (-1: the last) or a range N-M");
    return range;
  }

  // A spec of one format, or two for keys and values.
  KvSpec read_one() {
    const std::string_view piece = next(place_);
    ROTUNDA_CHECK(!is_side(piece, 'v'), "kv spec '", text_, "': got '", piece, "', expected k=SPEC,v=SPEC");
    if (!is_side(piece, 'k')) return read_single();
    place_ = text_.find('=', place_) + 1;
    const KvSpec keys = read_single();
    ROTUNDA_CHECK(take(',') && is_side(next(place_), 'v'), "kv spec '", text_, "': got '", piece, "' alone, expected k=SPEC,v=SPEC");
    place_ = text_.find('=', place_) + 1;
    const KvSpec values = read_single();
    if (keys == values) return keys;
    kv_registry().get(values);
    const auto both = kv_registry().get(keys).with_values(keys, values);
    ROTUNDA_CHECK(both, "kv spec '", text_, "': keys of ", keys.to_string(), " do not go with values of ", values.to_string(),
                  ", expected values of ", values_for(kv_registry().get(keys)), ", and no other options than those of the keys");
    return *both;
  }

  KvSpec read_single() {
    const std::string_view piece = take_next();
    const size_t colon = piece.find(':');
    ROTUNDA_CHECK(colon != std::string_view::npos || piece.find('=') == std::string_view::npos, "kv spec '", text_, "': got '", piece,
                  "', expected a format name first");
    KvSpec spec;
    spec.format = trim(piece.substr(0, colon));
    ROTUNDA_CHECK(is_name(spec.format), "kv spec '", text_, "': format name '", spec.format, "', expected NAME[:KEY=VALUE,...]");
    if (colon != std::string_view::npos) add_option(spec, trim(piece.substr(colon + 1)));
    while (place_ < text_.size() && text_[place_] == ',' && goes_on(next(place_ + 1))) {
      ++place_;
      add_option(spec, take_next());
    }
    return spec;
  }

  static bool goes_on(std::string_view piece) {
    return piece.find(':') == std::string_view::npos && piece.find('=') != std::string_view::npos && !is_layers(piece) &&
           !is_side(piece, 'k') && !is_side(piece, 'v');
  }

  void add_option(KvSpec& spec, std::string_view part) const {
    const size_t equals = part.find('=');
    ROTUNDA_CHECK(equals != std::string_view::npos, "kv spec '", text_, "': got '", part, "', expected KEY=VALUE");
    const std::string_view key = part.substr(0, equals);
    const std::string_view value = part.substr(equals + 1);
    ROTUNDA_CHECK(is_name(key), "kv spec '", text_, "': option name '", key, "', expected letters a-z, digits and '_'");
    ROTUNDA_CHECK(key != "k" && key != "v", "kv spec '", text_, "': option name '", key, "', which stands for keys or values: k=SPEC,v=SPEC");
    ROTUNDA_CHECK(!value.empty() && value.find_first_of(":= \t") == std::string_view::npos, "kv spec '", text_, "': option ", key,
                  " has the value '", value, "', expected one without blanks, ':' and '='");
    const bool added = spec.options.emplace(key, value).second;
    ROTUNDA_CHECK(added, "kv spec '", text_, "': option ", key, " is given twice");
  }

  std::string_view text_;
  size_t place_ = 0;
};

}  // namespace

// Written out: clang 14 crashes over the default of a type that holds vectors of itself.
bool KvSpec::operator==(const KvSpec& other) const {
  return format == other.format && options == other.options && parts == other.parts;
}

std::string KvSpec::to_string() const {
  if (!parts.empty()) {
    std::string text;
    for (const KvSpecPart& part : parts) {
      if (!text.empty()) text += ';';
      if (!part.layers.empty()) text += std::string(kLayers) + " " + kv::to_string(part.layers) + "=";
      text += part.spec.to_string();
    }
    return text;
  }
  std::string text = format;
  char separator = ':';
  for (const auto& [key, value] : options) {
    text += separator + key + "=" + value;
    separator = ',';
  }
  return text;
}

std::vector<KvSpec> parse_kv_specs(std::string_view text) { return SpecReader(text).read_list(); }

KvSpec parse_kv_spec(std::string_view text) {
  std::vector<KvSpec> specs = parse_kv_specs(text);
  ROTUNDA_CHECK(specs.size() == 1, "kv spec '", text, "': got ", specs.size(), " formats, expected one");
  return specs.front();
}

}  // namespace rotunda::kv
