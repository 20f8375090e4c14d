#include "io/tokenizer/tokenizer.h"

#include <algorithm>
#include <array>

#include "base/check.h"
#include "io/tokenizer/hf_tokenizer.h"
#include "io/tokenizer/sp_tokenizer.h"

namespace rotunda::io {
namespace {

constexpr std::string_view kReplacement = "\xEF\xBF\xBD";  // U+FFFD, what decoders write for unfinished bytes
constexpr size_t kMaxWindow = 64;
constexpr size_t kKeptTail = 16;

// How much of the end of `text` later tokens may still change.
size_t unsettled_bytes(std::string_view text) {
  const size_t size = text.size();
  while (text.ends_with(kReplacement)) text.remove_suffix(kReplacement.size());
  if (text.size() < size) return size - text.size();
  // Where decoding cleans up English (" n't" to "n't"), a blank goes when the rest arrives.
  static constexpr std::array<std::string_view, 7> kOpen = {" ", " '", " n", " n'", " 'v", " 'r", " '"};
  for (const std::string_view open : kOpen) {
    if (text.ends_with(open)) return open.size();
  }
  return 0;
}

}  // namespace

std::string StreamDecoder::advance(std::string_view settled) {
  const auto [a, b] = std::mismatch(shown_.begin(), shown_.end(), settled.begin(), settled.end());
  size_t from = static_cast<size_t>(b - settled.begin());
  size_t gone = static_cast<size_t>(shown_.end() - a);  // bytes given out that the text no longer has
  if (gone > 0 && from == settled.size()) return "";    // not there again yet
  // Byte fallback turns a whole run into U+FFFD, one per byte, when its last character is never finished; the characters
  // before it were given out already, so as many marks are passed over as they had bytes.
  while (from > 0 && from < settled.size() && (static_cast<unsigned char>(settled[from]) & 0xC0) == 0x80) {
    --from;
    ++gone;
  }
  while (gone > 0 && settled.substr(from).starts_with(kReplacement)) {
    from += kReplacement.size();
    --gone;
  }
  std::string out(settled.substr(from));
  shown_ = settled;
  return out;
}

std::string StreamDecoder::push(int64_t id) {
  ids_.push_back(id);
  const std::string text = tokenizer_.decode(ids_, /*skip_special=*/true);
  const size_t unsettled = unsettled_bytes(text);
  std::string out = advance(std::string_view(text).substr(0, text.size() - unsettled));
  if (ids_.size() >= kMaxWindow && unsettled == 0) {
    // Decode the last tokens only from here on, if they read the same without those before them.
    const std::vector<int64_t> tail(ids_.end() - static_cast<ptrdiff_t>(kKeptTail), ids_.end());
    std::string tail_text = tokenizer_.decode(tail, true);
    if (!tail_text.empty() && text.ends_with(tail_text)) {
      ids_ = tail;
      shown_ = std::move(tail_text);
    }
  }
  return out;
}

std::string StreamDecoder::finish() {
  std::string out = advance(tokenizer_.decode(ids_, true));
  ids_.clear();
  shown_.clear();
  return out;
}

std::unique_ptr<const Tokenizer> load_tokenizer(const std::filesystem::path& model_dir) {
  namespace fs = std::filesystem;
  std::error_code error;
  const fs::path json = model_dir / "tokenizer.json";
  const fs::path model = model_dir / "tokenizer.model";
  const bool has_json = fs::exists(json, error);
  ROTUNDA_CHECK(has_json || fs::exists(model, error), model_dir.string(), ": neither tokenizer.json nor tokenizer.model is there");
  const tokenizer::HfConfig config = tokenizer::read_hf_config(model_dir, has_json ? "" : "LlamaTokenizer");
  return has_json ? tokenizer::load_hf_tokenizer(json, config) : tokenizer::load_sp_tokenizer(model, config);
}

}  // namespace rotunda::io
