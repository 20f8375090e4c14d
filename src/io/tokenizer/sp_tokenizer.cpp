#include "io/tokenizer/sp_tokenizer.h"

#include <sentencepiece_processor.h>

#include <algorithm>
#include <set>
#include <unordered_map>

#include "base/check.h"
#include "io/tokenizer/bpe.h"
#include "io/tokenizer/sp_model_check.h"
#include "io/tokenizer/utf8.h"

namespace rotunda::io::tokenizer {
namespace {

constexpr std::string_view kSpace = "\xE2\x96\x81";  // U+2581, what SentencePiece writes for a blank
constexpr uintmax_t kMaxModelBytes = uintmax_t{256} << 20;

void check_status(const sentencepiece::util::Status& status, const std::string& what) {
  if (status.ok()) return;
  std::string message = status.ToString();
  std::replace(message.begin(), message.end(), '\n', ' ');
  throw_user_error(concat(what, ": ", message));
}

std::string replace_all(std::string_view text, std::string_view from, std::string_view to) {
  std::string out;
  size_t done = 0;
  for (size_t p = text.find(from); p != std::string_view::npos; p = text.find(from, done)) {
    out.append(text.substr(done, p - done)).append(to);
    done = p + from.size();
  }
  return out.append(text.substr(done));
}

std::string strip_left(std::string_view text) {
  while (!text.empty()) {
    const CodePoint cp = code_point_at(text, 0);
    if (!is_python_space(cp.value)) break;
    text.remove_prefix(cp.size_bytes);
  }
  return std::string(text);
}

std::string strip_right(std::string_view text) {
  while (!text.empty()) {
    const CodePoint cp = code_point_before(text, text.size());
    if (!is_python_space(cp.value)) break;
    text.remove_suffix(cp.size_bytes);
  }
  return std::string(text);
}

class SpTokenizer final : public Tokenizer {
 public:
  SpTokenizer(std::string bytes, const std::string& name, const HfConfig& config)
      : name_(name), legacy_(config.legacy.value_or(true)), add_prefix_space_(config.add_prefix_space.value_or(true)),
        clean_up_(config.clean_up_tokenization_spaces) {
    check_sp_model(bytes, name);
    // A second NormalizerSpec in the stream is merged into the first: normalizer_spec { add_dummy_prefix: false }.
    if (!legacy_) bytes += std::string("\x1A\x02\x18\x00", 4);
    check_status(sp_.LoadFromSerializedProto(bytes), name);
    n_pieces_ = sp_.GetPieceSize();
    max_id_ = n_pieces_ - 1;
    add_tokens(config);
    if (config.bos) bos_ = id_of(config.bos->content);
    if (config.eos) eos_ = id_of(config.eos->content);
    add_bos_ = config.add_bos_token.value_or(true);
    add_eos_ = config.add_eos_token.value_or(false);
    ROTUNDA_CHECK(!add_bos_ || bos_, name, ": add_bos_token is set, but there is no BOS token");
    ROTUNDA_CHECK(!add_eos_ || eos_, name, ": add_eos_token is set, but there is no EOS token");
    unk_text_ = config.unk ? config.unk->content : "";
    if (!legacy_) {
      ROTUNDA_CHECK(config.unk, name, ": \"legacy\": false needs an unk_token");
      std::vector<std::string> pieces;
      check_status(sp_.Encode(unk_text_, &pieces), name);
      unk_length_ = pieces.size();
    }
  }

  std::vector<int64_t> encode(std::string_view text, bool add_special) const override {
    std::vector<int64_t> ids;
    if (add_special && add_bos_) ids.push_back(*bos_);
    std::string clean = replace_ill_formed(text);
    if (!legacy_ && !clean.empty()) {
      clean = replace_all(clean, kSpace, " ");
      if (add_prefix_space_) clean.insert(0, kSpace);
    }
    size_t n_tokens = 0;
    bool lone_space_first = false;
    for (const std::string& part : split(clean)) {
      if (part.empty()) continue;
      if (const auto it = added_.find(part); it != added_.end()) {
        // Not legacy: the blank put in front is taken back where a special token follows at once.
        if (!legacy_ && n_tokens == 1 && lone_space_first && special_.contains(part)) ids.pop_back();
        ids.push_back(tokens_[it->second].id);
        ++n_tokens;
        continue;
      }
      std::vector<std::string> pieces = encode_plain(part);
      if (n_tokens == 0 && !pieces.empty()) lone_space_first = pieces[0] == kSpace;
      n_tokens += pieces.size();
      for (const std::string& piece : pieces) ids.push_back(id_of_piece(piece));
    }
    if (add_special && add_eos_) ids.push_back(*eos_);
    return ids;
  }

  std::string decode(const std::vector<int64_t>& ids, bool skip_special) const override {
    // Added tokens that are not special stand by themselves, a blank on either side; the runs between go together.
    std::vector<std::string> texts;
    std::vector<std::string> run;
    const auto flush = [&](bool keep_empty) {
      if (run.empty()) return;
      std::string text = join_pieces(run);
      if (keep_empty || !text.empty()) texts.push_back(std::move(text));
      run.clear();
    };
    for (const int64_t id : ids) {
      std::string token;
      if (const auto it = by_id_.find(id); it != by_id_.end()) {
        token = tokens_[it->second].content;
      } else if (id >= 0 && id < n_pieces_) {
        token = sp_.IdToPiece(static_cast<int>(id));
      } else {
        continue;
      }
      if (skip_special && special_.contains(token)) continue;
      if (stands_alone_.contains(token)) {
        flush(false);
        texts.push_back(std::move(token));
      } else {
        run.push_back(std::move(token));
      }
    }
    flush(true);
    std::string out;
    for (size_t i = 0; i < texts.size(); ++i) {
      if (i > 0) out += ' ';
      out += texts[i];
    }
    return clean_up_ ? clean_up_spaces(std::move(out)) : out;
  }

  int64_t vocab_size() const override { return max_id_ + 1; }
  std::optional<int64_t> bos_id() const override { return bos_; }
  std::optional<int64_t> eos_id() const override { return eos_; }

 private:
  void add_token(AddedToken token) {
    if (token.content.empty() || added_.contains(token.content)) return;
    const auto [it, is_new] = by_id_.emplace(token.id, tokens_.size());
    ROTUNDA_CHECK(is_new, name_, ": id ", token.id, " belongs to added token \"", tokens_[it->second].content.substr(0, 80),
                  "\" and to \"", token.content.substr(0, 80), '"');
    matcher_.add(token.content, tokens_.size());
    added_.emplace(token.content, tokens_.size());
    max_id_ = std::max(max_id_, token.id);
    tokens_.push_back(std::move(token));
  }

  void add_tokens(const HfConfig& config) {
    for (const AddedToken& token : config.added_tokens) add_token(token);
    // The next free id is the number of different tokens there are.
    int64_t n_known = n_pieces_;
    for (const AddedToken& token : tokens_) n_known += is_piece(token.content) ? 0 : 1;
    for (AddedToken token : config.special_tokens) {
      special_.insert(token.content);
      if (added_.contains(token.content)) continue;
      token.id = is_piece(token.content) ? sp_.PieceToId(token.content) : n_known++;
      add_token(std::move(token));
    }
    for (const AddedToken& token : tokens_) {
      if (!special_.contains(token.content)) stands_alone_.insert(token.content);
    }
    // An additional special token beyond the pieces stands alone too.
    for (const AddedToken& token : config.additional_special_tokens) {
      if (id_of(token.content).value_or(-1) >= n_pieces_) stands_alone_.insert(token.content);
    }
  }

  // PieceToId answers the unknown id for what it does not have.
  bool is_piece(const std::string& text) const { return sp_.IdToPiece(sp_.PieceToId(text)) == text; }

  int64_t id_of_piece(const std::string& piece) const {
    const auto it = added_.find(piece);
    return it != added_.end() ? tokens_[it->second].id : sp_.PieceToId(piece);
  }

  std::optional<int64_t> id_of(const std::string& text) const {
    const auto it = added_.find(text);
    if (it != added_.end()) return tokens_[it->second].id;
    if (is_piece(text)) return sp_.PieceToId(text);
    return std::nullopt;
  }

  // Cuts at added tokens; these take white space along, or go back into the text, as their flags say. A part that is
  // used up is left empty.
  std::vector<std::string> split(const std::string& text) const {
    std::vector<std::string> parts;
    size_t covered = 0;
    StringMatcher::Hit hit{};
    for (size_t from = 0; matcher_.find(text, from, hit); from = hit.end) {
      if (covered < hit.begin) parts.push_back(text.substr(covered, hit.begin - covered));
      parts.push_back(text.substr(hit.begin, hit.end - hit.begin));
      covered = hit.end;
    }
    if (covered < text.size()) parts.push_back(text.substr(covered));
    for (size_t i = 0; i < parts.size(); ++i) {
      const auto it = added_.find(parts[i]);
      if (it == added_.end()) continue;
      const AddedToken& token = tokens_[it->second];
      std::string* left = i > 0 && !parts[i - 1].empty() ? &parts[i - 1] : nullptr;
      std::string* right = i + 1 < parts.size() && !parts[i + 1].empty() ? &parts[i + 1] : nullptr;
      // The neighbours are asked for a blank as they were before the stripping, as transformers does.
      const bool joins_left = token.single_word && left != nullptr && left->back() != ' ';
      const bool joins_right = token.single_word && right != nullptr && right->front() != ' ';
      if (token.rstrip && right != nullptr) *right = strip_left(*right);
      if (token.lstrip && left != nullptr) *left = strip_right(*left);
      if (joins_left) {
        *left += token.content;
        parts[i].clear();
      } else if (joins_right) {
        *right = token.content + *right;
        parts[i].clear();
      }
    }
    return parts;
  }

  std::vector<std::string> encode_plain(const std::string& text) const {
    std::vector<std::string> pieces;
    if (legacy_ || !(text.starts_with(kSpace) || text.starts_with(' '))) {
      check_status(sp_.Encode(text, &pieces), name_);
      return pieces;
    }
    // The library strips blanks in front; behind the unknown token they stay, and its own pieces are cut off again.
    check_status(sp_.Encode(unk_text_ + text, &pieces), name_);
    if (pieces.size() >= unk_length_) pieces.erase(pieces.begin(), pieces.begin() + static_cast<ptrdiff_t>(unk_length_));
    return pieces;
  }

  // LlamaTokenizer.convert_tokens_to_string.
  std::string join_pieces(std::vector<std::string> tokens) const {
    if (tokens[0].starts_with(kSpace) && add_prefix_space_) tokens[0].erase(0, kSpace.size());
    std::string out;
    std::vector<std::string> run;
    bool previous_special = false;
    const auto flush = [&] {
      std::string text;
      check_status(sp_.Decode(run, &text), name_);
      out += text;
      run.clear();
    };
    for (size_t i = 0; i < tokens.size(); ++i) {
      if (special_.contains(tokens[i])) {
        if (!previous_special && i != 0 && legacy_) out += ' ';
        flush();
        out += tokens[i];
        previous_special = true;
      } else {
        if (previous_special && i == 1 && add_prefix_space_ && !tokens[i].starts_with(kSpace)) out += ' ';
        run.push_back(std::move(tokens[i]));
        previous_special = false;
      }
    }
    flush();
    return out;
  }

  sentencepiece::SentencePieceProcessor sp_;
  std::string name_;
  bool legacy_;
  bool add_prefix_space_;
  bool clean_up_;
  bool add_bos_ = true;
  bool add_eos_ = false;
  int64_t n_pieces_ = 0;
  int64_t max_id_ = -1;
  std::vector<AddedToken> tokens_;
  StringMap<size_t> added_;  // content to index in tokens_
  std::unordered_map<int64_t, size_t> by_id_;
  std::set<std::string, std::less<>> special_;
  std::set<std::string, std::less<>> stands_alone_;
  StringMatcher matcher_;
  std::optional<int64_t> bos_;
  std::optional<int64_t> eos_;
  std::string unk_text_;
  size_t unk_length_ = 0;
};

}  // namespace

std::unique_ptr<const Tokenizer> load_sp_tokenizer(const std::filesystem::path& path, const HfConfig& config) {
  return std::make_unique<SpTokenizer>(read_file(path, kMaxModelBytes), path.string(), config);
}

}  // namespace rotunda::io::tokenizer
