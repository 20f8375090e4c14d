#include "io/tokenizer/hf_config.h"

#include <algorithm>
#include <array>
#include <charconv>
#include <utility>

#include "base/check.h"

namespace rotunda::io::tokenizer {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;

constexpr std::array<const char*, 7> kRoles = {"bos_token", "eos_token", "unk_token", "sep_token",
                                               "pad_token", "cls_token", "mask_token"};

void check_id(const JsonRef& where, int64_t id) {
  if (id < 0 || id > kMaxTokenId) where.fail(concat("id ", id, ", allowed 0 to ", kMaxTokenId));
}

// A special token is a string, or an object with flags.
AddedToken read_special(const JsonRef& json) {
  AddedToken token;
  if (json.value().is_string()) {
    token.content = json.as_string();
    token.normalized = false;
  } else {
    token = read_added_token(json);
  }
  token.special = true;
  return token;
}

void set_role(std::vector<std::pair<std::string, AddedToken>>& roles, const std::string& role, AddedToken token) {
  for (auto& [name, value] : roles) {
    if (name == role) {
      value = std::move(token);
      return;
    }
  }
  roles.emplace_back(role, std::move(token));
}

std::optional<json> parse_if_there(const fs::path& path) {
  std::error_code error;
  if (!fs::exists(path, error)) return std::nullopt;
  json parsed = parse_json_file(path);
  ROTUNDA_CHECK(parsed.is_object(), path.string(), ": got ", parsed.type_name(), ", expected an object");
  return parsed;
}

void read_added_decoder(const JsonRef& json, std::vector<AddedToken>& out) {
  if (!json.value().is_object()) json.fail(concat("got ", json.value().type_name(), ", expected an object"));
  for (const auto& [key, value] : json.value().items()) {
    const JsonRef entry(value, concat(json.where(), "[\"", key.substr(0, 40), "\"]"));
    AddedToken token = read_added_token(entry);
    const auto [end, error] = std::from_chars(key.data(), key.data() + key.size(), token.id);
    if (error != std::errc() || end != key.data() + key.size()) entry.fail("the key is no token id");
    check_id(entry, token.id);
    out.push_back(std::move(token));
  }
}

}  // namespace

HfConfig read_hf_config(const fs::path& model_dir, const std::string& default_class) {
  HfConfig config;
  config.tokenizer_class = default_class;
  std::vector<std::pair<std::string, AddedToken>> roles;
  std::vector<AddedToken> additional;
  bool has_added_decoder = false;

  const fs::path config_path = model_dir / "tokenizer_config.json";
  const auto main = parse_if_there(config_path);
  if (main) {
    const JsonRef root(*main, config_path.string() + ":");
    config.tokenizer_class = root.string_or("tokenizer_class", default_class);
    if (config.tokenizer_class.ends_with("Fast")) config.tokenizer_class.resize(config.tokenizer_class.size() - 4);
    const auto read_flag = [&](const char* key) {
      return root.has(key) ? std::optional<bool>(root.at(key).as_bool()) : std::nullopt;
    };
    config.add_bos_token = read_flag("add_bos_token");
    config.add_eos_token = read_flag("add_eos_token");
    config.add_prefix_space = read_flag("add_prefix_space");
    config.legacy = read_flag("legacy");
    config.clean_up_tokenization_spaces = root.bool_or("clean_up_tokenization_spaces", false);
    has_added_decoder = root.has("added_tokens_decoder");
    if (has_added_decoder) read_added_decoder(root.at("added_tokens_decoder"), config.added_tokens);
    for (const char* role : kRoles) {
      if (root.has(role)) set_role(roles, role, read_special(root.at(role)));
    }
    if (root.has("additional_special_tokens")) {
      for (const JsonRef& item : root.at("additional_special_tokens").items()) additional.push_back(read_special(item));
    }
  }
  // The Llama classes have these where no file says otherwise.
  if (config.is_llama()) {
    for (const auto& [role, text] : {std::pair{"bos_token", "<s>"}, {"eos_token", "</s>"}, {"unk_token", "<unk>"}}) {
      const bool given = main && main->contains(role);  // a null counts as given
      if (given) continue;
      AddedToken token;
      token.content = text;
      token.normalized = false;
      token.special = true;
      set_role(roles, role, std::move(token));
    }
  }
  // The two older files count only where the newer table is not there.
  if (!has_added_decoder) {
    const fs::path map_path = model_dir / "special_tokens_map.json";
    if (const auto map = parse_if_there(map_path)) {
      const JsonRef root(*map, map_path.string() + ":");
      for (const char* role : kRoles) {
        if (root.has(role)) set_role(roles, role, read_special(root.at(role)));
      }
      if (root.has("additional_special_tokens")) {
        for (const JsonRef& item : root.at("additional_special_tokens").items()) additional.push_back(read_special(item));
      }
    }
    const fs::path added_path = model_dir / "added_tokens.json";
    if (const auto added = parse_if_there(added_path)) {
      for (const auto& [text, value] : added->items()) {
        const JsonRef entry(value, concat(added_path.string(), ": [\"", text.substr(0, 80), "\"]"));
        AddedToken token;
        token.content = text;
        token.id = entry.as_int();
        check_id(entry, token.id);
        const auto is_this = [&](const AddedToken& t) { return t.content == token.content; };
        token.special = std::any_of(roles.begin(), roles.end(), [&](const auto& r) { return is_this(r.second); }) ||
                        std::any_of(additional.begin(), additional.end(), is_this);
        token.normalized = !token.special;
        config.added_tokens.push_back(std::move(token));
      }
    }
  }
  std::sort(config.added_tokens.begin(), config.added_tokens.end(),
            [](const AddedToken& a, const AddedToken& b) { return a.id < b.id; });
  for (size_t i = 1; i < config.added_tokens.size(); ++i) {
    const AddedToken& a = config.added_tokens[i - 1];
    const AddedToken& b = config.added_tokens[i];
    ROTUNDA_CHECK(a.id != b.id, config_path.string(), ": id ", a.id, " belongs to added token \"", a.content.substr(0, 80),
                  "\" and to \"", b.content.substr(0, 80), '"');
  }

  const auto add_special = [&](const AddedToken& token) {
    for (const AddedToken& t : config.special_tokens) {
      if (t.content == token.content) return;
    }
    config.special_tokens.push_back(token);
  };
  for (const char* role : kRoles) {
    for (const auto& [name, token] : roles) {
      if (name != role || token.content.empty()) continue;
      add_special(token);
      if (name == "bos_token") config.bos = token;
      if (name == "eos_token") config.eos = token;
      if (name == "unk_token") config.unk = token;
    }
  }
  for (const AddedToken& token : additional) {
    if (token.content.empty()) continue;
    config.additional_special_tokens.push_back(token);
    add_special(token);
  }
  return config;
}

std::string clean_up_spaces(std::string text) {
  static constexpr std::array<std::pair<std::string_view, std::string_view>, 10> kRules = {{
      {" .", "."}, {" ?", "?"}, {" !", "!"}, {" ,", ","}, {" ' ", "'"},
      {" n't", "n't"}, {" 'm", "'m"}, {" 's", "'s"}, {" 've", "'ve"}, {" 're", "'re"},
  }};
  for (const auto& [from, to] : kRules) {
    std::string out;
    size_t done = 0;
    for (size_t p = text.find(from); p != std::string::npos; p = text.find(from, done)) {
      out.append(text, done, p - done).append(to);
      done = p + from.size();
    }
    if (done == 0) continue;
    out.append(text, done);
    text = std::move(out);
  }
  return text;
}

}  // namespace rotunda::io::tokenizer
