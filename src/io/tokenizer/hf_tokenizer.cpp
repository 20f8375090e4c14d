#include "io/tokenizer/hf_tokenizer.h"

#include <algorithm>
#include <set>

#include "base/check.h"
#include "io/tokenizer/bpe.h"
#include "io/tokenizer/pipeline.h"
#include "io/tokenizer/utf8.h"

namespace rotunda::io::tokenizer {
namespace {

constexpr size_t kMaxCachedWordBytes = 256;

// Added tokens, and the two searches for them: in the raw text and in the normalized one.
class AddedVocabulary {
 public:
  // Follows tokenizers' AddedVocabulary::add_tokens: a content comes once, a token of the model keeps its id, others
  // get the next free one. Returns the id, or nothing for a content that is there already.
  std::optional<int64_t> add(AddedToken token, const BpeModel& model) {
    if (token.content.empty() || ids_.contains(token.content)) return std::nullopt;
    if (const auto id = model.id_of(token.content)) {
      token.id = *id;
    } else {
      token.id = std::max(model.n_tokens(), max_id_ + 1);
    }
    max_id_ = std::max(max_id_, token.id);
    if (token.special) special_.insert(token.content);
    ids_.emplace(token.content, token.id);
    by_id_[token.id] = tokens_.size();
    tokens_.push_back(std::move(token));
    return tokens_.back().id;
  }

  void build_matchers(const Normalizer& normalizer) {
    // Special tokens first: of two that normalize to the same text the first wins.
    for (const bool special : {true, false}) {
      for (size_t i = 0; i < tokens_.size(); ++i) {
        const AddedToken& token = tokens_[i];
        if (token.special != special) continue;
        if (token.normalized) {
          normalized_.add(normalizer ? normalizer(token.content) : token.content, i);
        } else {
          raw_.add(token.content, i);
        }
      }
    }
  }

  // Calls on_text(begin, end) for the text between added tokens, never empty, and on_token(id) for each, in order.
  template <typename OnText, typename OnToken>
  void split(std::string_view text, bool normalized, const OnText& on_text, const OnToken& on_token) const {
    const StringMatcher& matcher = normalized ? normalized_ : raw_;
    size_t covered = 0;
    StringMatcher::Hit hit{};
    for (size_t from = 0; matcher.find(text, from, hit); from = hit.end) {
      const AddedToken& token = tokens_[hit.index];
      size_t begin = hit.begin;
      size_t end = hit.end;
      if (token.single_word) {
        const bool open_left = begin == 0 || !is_word_char(code_point_before(text, begin).value);
        const bool open_right = end == text.size() || !is_word_char(code_point_at(text, end).value);
        if (!open_left || !open_right) continue;
      }
      if (token.lstrip) {
        while (begin > covered) {
          const CodePoint cp = code_point_before(text, begin);
          if (!is_white_space(cp.value)) break;
          begin -= cp.size_bytes;
        }
        begin = std::max(begin, covered);
      }
      if (token.rstrip) {
        while (end < text.size()) {
          const CodePoint cp = code_point_at(text, end);
          if (!is_white_space(cp.value)) break;
          end += cp.size_bytes;
        }
      }
      if (covered < begin) on_text(covered, begin);
      on_token(token.id);
      // A token that stands in white space which the one before took along still counts, as in Hugging Face.
      covered = end;
    }
    if (covered < text.size()) on_text(covered, text.size());
  }

  bool contains(std::string_view content) const { return ids_.find(content) != ids_.end(); }
  std::optional<int64_t> id_of(std::string_view content) const {
    const auto it = ids_.find(content);
    return it == ids_.end() ? std::nullopt : std::optional<int64_t>(it->second);
  }
  const std::string* token_of(int64_t id) const {
    const auto it = by_id_.find(id);
    return it == by_id_.end() ? nullptr : &tokens_[it->second].content;
  }
  bool is_special(const std::string& content) const { return special_.contains(content); }
  int64_t max_id() const { return max_id_; }

 private:
  std::vector<AddedToken> tokens_;
  StringMap<int64_t> ids_;
  std::unordered_map<int64_t, size_t> by_id_;
  std::set<std::string> special_;
  StringMatcher raw_;
  StringMatcher normalized_;
  int64_t max_id_ = -1;
};

class HfTokenizer final : public Tokenizer {
 public:
  HfTokenizer(const JsonRef& root, const HfConfig& config)
      : model_(model_part(root)), clean_up_(config.clean_up_tokenization_spaces) {
    if (root.has("normalizer")) normalizer_ = read_normalizer(root.at("normalizer"));
    if (root.has("pre_tokenizer")) {
      // transformers sets add_prefix_space of a ByteLevel that stands alone from the config, false where not given;
      // its Llama classes do not.
      const bool prefix_space = config.add_prefix_space.value_or(false);
      const bool keep = config.is_llama() || config.tokenizer_class.empty();
      pre_tokenizer_ = read_pre_tokenizer(root.at("pre_tokenizer"), keep ? nullptr : &prefix_space);
    }
    if (root.has("decoder")) decoder_ = read_decoder(root.at("decoder"));
    read_added_tokens(root);
    for (const AddedToken& token : config.added_tokens) added_.add(token, model_);
    for (const AddedToken& token : config.special_tokens) added_.add(token, model_);
    added_.build_matchers(normalizer_);
    if (root.has("post_processor")) read_post_processor(root.at("post_processor"));

    if (config.bos) bos_ = id_of(config.bos->content);
    if (config.eos) eos_ = id_of(config.eos->content);
    if (config.is_llama()) {  // the Llama classes replace the post-processor by their own
      before_.clear();
      after_.clear();
      if (config.add_bos_token.value_or(true)) {
        if (!bos_) root.fail("add_bos_token is set, but there is no BOS token");
        before_.push_back(*bos_);
      }
      if (config.add_eos_token.value_or(false)) {
        if (!eos_) root.fail("add_eos_token is set, but there is no EOS token");
        after_.push_back(*eos_);
      }
    }
  }

  std::vector<int64_t> encode(std::string_view text, bool add_special) const override {
    std::vector<int64_t> ids;
    if (add_special) ids = before_;
    const std::string clean = replace_ill_formed(text);
    const std::string_view view = clean;
    WordCache cache;
    added_.split(
        view, /*normalized=*/false,
        [&](size_t begin, size_t end) {
          std::string part(view.substr(begin, end - begin));
          if (normalizer_) part = normalizer_(std::move(part));
          added_.split(
              part, /*normalized=*/true,
              [&](size_t b, size_t e) { encode_plain(part.substr(b, e - b), begin == 0 && b == 0, cache, ids); },
              [&](int64_t id) { ids.push_back(id); });
        },
        [&](int64_t id) { ids.push_back(id); });
    if (add_special) ids.insert(ids.end(), after_.begin(), after_.end());
    return ids;
  }

  std::string decode(const std::vector<int64_t>& ids, bool skip_special) const override {
    std::vector<std::string> tokens;
    tokens.reserve(ids.size());
    for (const int64_t id : ids) {
      const std::string* token = added_.token_of(id);
      if (token == nullptr) token = model_.token_of(id);
      if (token == nullptr || (skip_special && added_.is_special(*token))) continue;
      tokens.push_back(*token);
    }
    if (decoder_) tokens = decoder_(std::move(tokens));
    std::string text;
    for (size_t i = 0; i < tokens.size(); ++i) {
      if (!decoder_ && i > 0) text += ' ';
      text += tokens[i];
    }
    return clean_up_ ? clean_up_spaces(std::move(text)) : text;
  }

  int64_t vocab_size() const override { return std::max(model_.max_id(), added_.max_id()) + 1; }
  std::optional<int64_t> bos_id() const override { return bos_; }
  std::optional<int64_t> eos_id() const override { return eos_; }

 private:
  using WordCache = StringMap<std::vector<int64_t>>;

  static JsonRef model_part(const JsonRef& root) {
    const JsonRef model = root.at("model");
    // Files from before 2021 may leave the type out.
    const std::string type = model.string_or("type", model.has("merges") ? "BPE" : "");
    if (type != "BPE") model.fail(concat("type \"", type.substr(0, 80), "\" is not supported, only BPE is"));
    return model;
  }

  void read_added_tokens(const JsonRef& root) {
    if (!root.has("added_tokens")) return;
    for (const JsonRef& json : root.at("added_tokens").items()) {
      const AddedToken token = read_added_token(json);
      const int64_t id = json.at("id").as_int();
      if (id < 0 || id > kMaxTokenId) json.fail(concat("id ", id, ", allowed 0 to ", kMaxTokenId));
      if (token.content.empty()) continue;
      if (added_.contains(token.content)) json.fail(concat("\"", token.content.substr(0, 80), "\" is there twice"));
      const auto got = added_.add(token, model_);
      // Hugging Face numbers added tokens itself and does not look at the number; where the two differ the file is wrong.
      if (got && *got != id) {
        json.fail(concat("\"", token.content.substr(0, 80), "\" has id ", id, ", expected ", *got,
                         " (its id in the vocabulary, or the next free one)"));
      }
    }
  }

  void read_post_processor(const JsonRef& json) {
    const std::string& type = json.at("type").as_string();
    if (type == "Sequence") {
      for (const JsonRef& step : json.at("processors").items()) read_post_processor(step);
      return;
    }
    if (type == "ByteLevel") return;  // moves offsets only
    if (type != "TemplateProcessing") {
      json.fail(concat("post-processor \"", type.substr(0, 80), "\" is not supported"));
    }
    std::vector<int64_t> before, after;
    bool seen_text = false;
    for (const JsonRef& item : json.at("single").items()) {
      if (item.has("Sequence")) {
        const JsonRef id = item.at("Sequence").at("id");
        if (id.as_string() != "A" || seen_text) id.fail("expected the text, \"A\", once");
        seen_text = true;
        continue;
      }
      const std::string& name = item.at("SpecialToken").at("id").as_string();
      const JsonRef table = json.at("special_tokens");
      if (!table.has(name.c_str())) table.fail(concat("\"", name.substr(0, 80), "\" is missing"));
      for (const JsonRef& id : table.at(name.c_str()).at("ids").items()) {
        const int64_t value = id.as_int();
        if (added_.token_of(value) == nullptr && model_.token_of(value) == nullptr) {
          id.fail(concat("no token has the id ", value));
        }
        (seen_text ? after : before).push_back(value);
      }
    }
    if (!seen_text) json.at("single").fail("the text, \"A\", is missing");
    // A template later in a sequence goes around what the earlier ones made.
    before_.insert(before_.begin(), before.begin(), before.end());
    after_.insert(after_.end(), after.begin(), after.end());
  }

  void encode_plain(std::string text, bool at_start, WordCache& cache, std::vector<int64_t>& ids) const {
    std::vector<Piece> pieces;
    pieces.push_back({std::move(text), at_start});
    if (pre_tokenizer_) pieces = pre_tokenizer_(std::move(pieces));
    for (const Piece& piece : pieces) {
      if (piece.text.size() > kMaxCachedWordBytes) {
        model_.tokenize(piece.text, ids);
        continue;
      }
      const auto [it, is_new] = cache.try_emplace(piece.text);
      if (is_new) model_.tokenize(piece.text, it->second);
      ids.insert(ids.end(), it->second.begin(), it->second.end());
    }
  }

  std::optional<int64_t> id_of(std::string_view token) const {
    const auto id = added_.id_of(token);
    return id ? id : model_.id_of(token);
  }

  BpeModel model_;
  Normalizer normalizer_;
  PreTokenizer pre_tokenizer_;
  TokenDecoder decoder_;
  AddedVocabulary added_;
  std::vector<int64_t> before_;  // what add_special puts around the text
  std::vector<int64_t> after_;
  std::optional<int64_t> bos_;
  std::optional<int64_t> eos_;
  bool clean_up_;
};

}  // namespace

std::unique_ptr<const Tokenizer> load_hf_tokenizer(const std::filesystem::path& path, const HfConfig& config) {
  const nlohmann::json document = parse_json_file(path);
  const JsonRef root(document, path.string() + ":");
  if (!document.is_object()) root.fail(concat("got ", document.type_name(), ", expected an object"));
  return std::make_unique<HfTokenizer>(root, config);
}

}  // namespace rotunda::io::tokenizer
