#include "io/tokenizer/bpe.h"

#include <algorithm>
#include <bit>
#include <queue>

#include "base/check.h"
#include "io/tokenizer/utf8.h"

namespace rotunda::io::tokenizer {
namespace {

constexpr uint64_t kEmptyKey = ~uint64_t{0};  // no pair of ids has it: ids stay below 2^24

uint64_t pair_key(int32_t left, int32_t right) {
  return static_cast<uint64_t>(static_cast<uint32_t>(left)) << 32 | static_cast<uint32_t>(right);
}

// A symbol of a word under merging; symbols form a doubly linked list of indices.
struct Symbol {
  int32_t id;
  int32_t prev;  // -1 at the start
  int32_t next;  // -1 at the end
  bool alive;
};

struct Candidate {
  int32_t rank;
  int32_t pos;  // of the left symbol
  int32_t new_id;
  bool operator>(const Candidate& o) const { return rank != o.rank ? rank > o.rank : pos > o.pos; }
};

void merge_all(const MergeTable& merges, const std::vector<int32_t>& initial, std::vector<int64_t>& ids) {
  const auto n = static_cast<int32_t>(initial.size());
  std::vector<Symbol> symbols(initial.size());
  std::vector<Candidate> start;
  for (int32_t i = 0; i < n; ++i) {
    symbols[static_cast<size_t>(i)] = {initial[static_cast<size_t>(i)], i - 1, i + 1 < n ? i + 1 : -1, true};
    if (i + 1 == n) break;
    if (const auto* m = merges.find(initial[static_cast<size_t>(i)], initial[static_cast<size_t>(i) + 1])) {
      start.push_back({m->rank, i, m->new_id});
    }
  }
  std::priority_queue<Candidate, std::vector<Candidate>, std::greater<>> queue(std::greater<>{}, std::move(start));
  const auto at = [&](int32_t i) -> Symbol& { return symbols[static_cast<size_t>(i)]; };
  const auto offer = [&](int32_t left, int32_t right) {
    if (const auto* m = merges.find(at(left).id, at(right).id)) queue.push({m->rank, left, m->new_id});
  };
  while (!queue.empty()) {
    const Candidate top = queue.top();
    queue.pop();
    Symbol& left = at(top.pos);
    if (!left.alive || left.next < 0) continue;
    Symbol& right = at(left.next);
    // A candidate is stale where its pair is no longer there.
    const auto* m = merges.find(left.id, right.id);
    if (m == nullptr || m->new_id != top.new_id) continue;
    left.id = top.new_id;
    right.alive = false;
    left.next = right.next;
    if (right.next >= 0) at(right.next).prev = top.pos;
    if (left.prev >= 0) offer(left.prev, top.pos);
    if (left.next >= 0) offer(top.pos, left.next);
  }
  for (int32_t i = n > 0 ? 0 : -1; i >= 0; i = at(i).next) ids.push_back(at(i).id);
}

}  // namespace

MergeTable::MergeTable(size_t n_merges) : slots_(std::bit_ceil(2 * n_merges + 2), Slot{kEmptyKey, {}}) {}

size_t MergeTable::slot_of(uint64_t key) const {
  const size_t mask = slots_.size() - 1;
  size_t slot = static_cast<size_t>(key * 0x9E3779B97F4A7C15u >> 20) & mask;
  while (slots_[slot].key != key && slots_[slot].key != kEmptyKey) slot = (slot + 1) & mask;
  return slot;
}

void MergeTable::insert(int32_t left, int32_t right, Merge merge) {
  const uint64_t key = pair_key(left, right);
  slots_[slot_of(key)] = {key, merge};
}

const MergeTable::Merge* MergeTable::find(int32_t left, int32_t right) const {
  const Slot& slot = slots_[slot_of(pair_key(left, right))];
  return slot.key == kEmptyKey ? nullptr : &slot.merge;
}

BpeModel::BpeModel(const JsonRef& model) {
  if (model.has("dropout") && model.at("dropout").as_number() != 0) model.at("dropout").fail("dropout is not supported");
  prefix_ = model.string_or("continuing_subword_prefix", "");
  suffix_ = model.string_or("end_of_word_suffix", "");
  fuse_unk_ = model.bool_or("fuse_unk", false);
  byte_fallback_ = model.bool_or("byte_fallback", false);
  ignore_merges_ = model.bool_or("ignore_merges", false);

  const JsonRef vocab = model.at("vocab");
  if (!vocab.value().is_object()) vocab.fail(concat("got ", vocab.value().type_name(), ", expected an object"));
  vocab_.reserve(vocab.value().size());
  for (const auto& [token, value] : vocab.value().items()) {
    const int64_t id = JsonRef(value, concat(vocab.where(), "[\"", token.substr(0, 80), "\"]")).as_int();
    if (id < 0 || id > kMaxTokenId) vocab.fail(concat("token \"", token.substr(0, 80), "\" has id ", id, ", allowed 0 to ", kMaxTokenId));
    const auto entry = vocab_.emplace(token, static_cast<int32_t>(id)).first;
    const auto [other, is_new] = tokens_.emplace(id, &entry->first);
    if (!is_new) {
      vocab.fail(concat("id ", id, " belongs to \"", other->second->substr(0, 80), "\" and to \"", token.substr(0, 80), '"'));
    }
    max_id_ = std::max(max_id_, id);
  }

  const JsonRef merges = model.at("merges");
  if (!merges.value().is_array()) merges.fail(concat("got ", merges.value().type_name(), ", expected an array"));
  const auto& list = merges.value();
  merges_ = MergeTable(list.size());
  // The prefix is left out of the right half when two tokens join.
  size_t prefix_chars = 0;
  for (size_t p = 0; p < prefix_.size(); p += code_point_at(prefix_, p).size_bytes) ++prefix_chars;
  int32_t rank = 0;
  std::string joined;
  for (size_t i = 0; i < list.size(); ++i) {
    const auto here = [&] { return JsonRef(list[i], concat(merges.where(), '[', i, ']')); };
    std::string_view left, right;
    if (list[i].is_string()) {
      const std::string_view line = list[i].get_ref<const std::string&>();
      if (line.starts_with("#version")) continue;
      const size_t blank = line.find(' ');
      if (blank == std::string_view::npos || line.find(' ', blank + 1) != std::string_view::npos) {
        here().fail("expected two tokens with one blank between");
      }
      left = line.substr(0, blank);
      right = line.substr(blank + 1);
    } else if (list[i].is_array() && list[i].size() == 2 && list[i][0].is_string() && list[i][1].is_string()) {
      left = list[i][0].get_ref<const std::string&>();
      right = list[i][1].get_ref<const std::string&>();
    } else {
      here().fail("expected \"a b\" or [\"a\", \"b\"]");
    }
    const auto known = [&](std::string_view token) {
      const auto id = id_of(token);
      if (!id) here().fail(concat("token \"", token.substr(0, 80), "\" is not in the vocabulary"));
      return static_cast<int32_t>(*id);
    };
    const int32_t left_id = known(left);
    const int32_t right_id = known(right);
    size_t skip = 0;
    for (size_t c = 0; c < prefix_chars; ++c) {
      if (skip >= right.size()) here().fail("the right token is shorter than continuing_subword_prefix");
      skip += code_point_at(right, skip).size_bytes;
    }
    joined.assign(left).append(right.substr(skip));
    merges_.insert(left_id, right_id, {rank++, known(joined)});
  }

  if (model.has("unk_token")) {
    const JsonRef unk = model.at("unk_token");
    const auto id = id_of(unk.as_string());
    if (!id) unk.fail(concat("token \"", unk.as_string().substr(0, 80), "\" is not in the vocabulary"));
    unk_id_ = static_cast<int32_t>(*id);
  }
  constexpr char kHex[] = "0123456789ABCDEF";
  for (int b = 0; b < 256; ++b) {
    const auto id = id_of(std::string("<0x") + kHex[b >> 4] + kHex[b & 15] + '>');
    if (id) byte_ids_[b] = static_cast<int32_t>(*id);
  }
}

std::optional<int64_t> BpeModel::id_of(std::string_view token) const {
  const auto it = vocab_.find(token);
  if (it == vocab_.end()) return std::nullopt;
  return it->second;
}

const std::string* BpeModel::token_of(int64_t id) const {
  const auto it = tokens_.find(id);
  return it == tokens_.end() ? nullptr : it->second;
}

void BpeModel::split_to_symbols(std::string_view word, std::vector<int32_t>& symbols) const {
  bool unk_pending = false;
  std::string decorated;
  for (size_t pos = 0; pos < word.size();) {
    const size_t size = code_point_at(word, pos).size_bytes;
    std::string_view piece = word.substr(pos, size);
    const bool is_first = pos == 0;
    pos += size;
    if ((!is_first && !prefix_.empty()) || (pos == word.size() && !suffix_.empty())) {
      decorated = is_first ? "" : prefix_;
      decorated += piece;
      if (pos == word.size()) decorated += suffix_;
      piece = decorated;
    }
    const auto it = vocab_.find(piece);
    if (it != vocab_.end()) {
      if (unk_pending) symbols.push_back(*unk_id_);
      unk_pending = false;
      symbols.push_back(it->second);
      continue;
    }
    // All bytes or none. A pending unknown stays pending behind them: Hugging Face has it that way round.
    if (byte_fallback_ && std::all_of(piece.begin(), piece.end(), [&](char b) {
          return byte_ids_[static_cast<unsigned char>(b)].has_value();
        })) {
      for (const char b : piece) symbols.push_back(*byte_ids_[static_cast<unsigned char>(b)]);
      continue;
    }
    if (!unk_id_) continue;  // such characters vanish, in Hugging Face too
    if (unk_pending && !fuse_unk_) symbols.push_back(*unk_id_);
    unk_pending = true;
  }
  if (unk_pending) symbols.push_back(*unk_id_);
}

void BpeModel::tokenize(std::string_view word, std::vector<int64_t>& ids) const {
  if (word.empty()) return;
  if (ignore_merges_) {
    if (const auto id = id_of(word)) {
      ids.push_back(*id);
      return;
    }
  }
  std::vector<int32_t> symbols;
  symbols.reserve(word.size());
  split_to_symbols(word, symbols);
  ROTUNDA_CHECK(symbols.size() < static_cast<size_t>(INT32_MAX), "tokenizer: a word of ", symbols.size(), " symbols");
  merge_all(merges_, symbols, ids);
}

}  // namespace rotunda::io::tokenizer
