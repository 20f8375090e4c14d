#include "io/tokenizer/sp_model_check.h"

#include <cmath>
#include <cstdint>
#include <cstring>
#include <optional>
#include <vector>

#include "base/check.h"
#include "io/tokenizer/utf8.h"

namespace rotunda::io::tokenizer {
namespace {

constexpr size_t kMaxPieces = size_t{1} << 22;
constexpr size_t kMaxPieceBytes = 4096;

// One field of a protobuf message (wire format: https://protobuf.dev/programming-guides/encoding).
struct Field {
  uint32_t number;
  uint32_t wire_type;     // 0 varint, 1 eight bytes, 2 length-delimited, 5 four bytes
  uint64_t value;         // for wire types 0, 1 and 5
  std::string_view data;  // for wire type 2
};

class FieldReader {
 public:
  FieldReader(std::string_view message, const std::string& name) : rest_(message), name_(name) {}

  std::optional<Field> next() {
    if (rest_.empty()) return std::nullopt;
    const uint64_t key = varint();
    Field field{static_cast<uint32_t>(key >> 3), static_cast<uint32_t>(key & 7), 0, {}};
    ROTUNDA_CHECK(key >> 3 != 0 && key >> 3 < (uint64_t{1} << 29), name_, ": not a SentencePiece model (field ", key >> 3, ')');
    switch (field.wire_type) {
      case 0:
        field.value = varint();
        break;
      case 1:
      case 5: {
        const std::string_view bytes = take(field.wire_type == 1 ? 8 : 4);
        std::memcpy(&field.value, bytes.data(), bytes.size());
        break;
      }
      case 2:
        field.data = take(varint());
        break;
      default:
        throw_user_error(concat(name_, ": not a SentencePiece model (wire type ", field.wire_type, ')'));
    }
    return field;
  }

 private:
  uint64_t varint() {
    uint64_t value = 0;
    for (int shift = 0; shift < 64; shift += 7) {
      const auto byte = static_cast<unsigned char>(take(1)[0]);
      value |= uint64_t{byte & 0x7Fu} << shift;
      if (byte < 0x80) return value;
    }
    throw_user_error(concat(name_, ": not a SentencePiece model (number of more than 10 bytes)"));
  }
  std::string_view take(uint64_t n) {
    ROTUNDA_CHECK(n <= rest_.size(), name_, ": ends early (", n, " bytes wanted, ", rest_.size(), " left)");
    const std::string_view out = rest_.substr(0, n);
    rest_.remove_prefix(n);
    return out;
  }

  std::string_view rest_;
  const std::string& name_;
};

// The character map of the normalizer: its size, a double-array trie (Darts-clone) of that many bytes, then the
// replacements, each ended by a zero byte. Walks every node that a text can reach.
void check_charsmap(std::string_view blob, const std::string& name) {
  if (blob.empty()) return;
  const auto bad = [&](const char* what) { throw_user_error(concat(name, ": the character map of the normalizer ", what)); };
  uint32_t trie_bytes = 0;
  if (blob.size() <= sizeof trie_bytes) bad("ends early");
  std::memcpy(&trie_bytes, blob.data(), sizeof trie_bytes);
  if (trie_bytes >= blob.size() - sizeof trie_bytes || trie_bytes < 1024 || trie_bytes % 4 != 0) bad("has a wrong size");
  const std::string_view replacements = blob.substr(sizeof trie_bytes + trie_bytes);
  if (replacements.back() != '\0') bad("ends early");
  if (!is_valid_utf8(replacements)) bad("is not UTF-8");
  std::vector<uint32_t> units(trie_bytes / 4);
  std::memcpy(units.data(), blob.data() + sizeof trie_bytes, trie_bytes);

  const auto offset = [](uint32_t unit) { return (unit >> 10) << ((unit & (1u << 9)) >> 6); };
  const auto label = [](uint32_t unit) { return unit & ((1u << 31) | 0xFF); };
  std::vector<bool> seen(units.size());
  std::vector<size_t> stack{0};
  seen[0] = true;
  while (!stack.empty()) {
    const size_t node = stack.back();
    stack.pop_back();
    const size_t base = node ^ offset(units[node]);
    // A look at a child touches base ^ byte, for any byte.
    if ((base | 0xFF) >= units.size()) bad("points beyond its end");
    if ((units[node] >> 8 & 1) != 0) {  // has a leaf: its value is a place among the replacements
      if ((units[base] & 0x7FFFFFFF) >= replacements.size()) bad("points beyond its replacements");
    }
    for (uint32_t byte = 1; byte < 256; ++byte) {
      const size_t child = base ^ byte;
      if (label(units[child]) != byte || seen[child]) continue;
      seen[child] = true;
      stack.push_back(child);
    }
  }
}

}  // namespace

void check_sp_model(std::string_view bytes, const std::string& name) {
  ROTUNDA_CHECK(!bytes.empty(), name, ": empty file");
  uint64_t model_type = 1;  // unigram, where not said
  size_t n_pieces = 0;
  FieldReader model(bytes, name);
  while (const auto field = model.next()) {
    if (field->wire_type != 2) continue;
    if (field->number == 1) {
      ROTUNDA_CHECK(++n_pieces <= kMaxPieces, name, ": more than ", kMaxPieces, " pieces");
      FieldReader piece(field->data, name);
      while (const auto part = piece.next()) {
        if (part->number == 1 && part->wire_type == 2) {
          ROTUNDA_CHECK(is_valid_utf8(part->data), name, ": piece ", n_pieces - 1, " is not UTF-8");
          ROTUNDA_CHECK(part->data.size() <= kMaxPieceBytes, name, ": piece ", n_pieces - 1, " has ", part->data.size(),
                        " bytes, at most ", kMaxPieceBytes);
        }
        if (part->number == 2 && part->wire_type == 5) {
          float score = 0;
          const auto bits = static_cast<uint32_t>(part->value);
          std::memcpy(&score, &bits, sizeof score);
          ROTUNDA_CHECK(std::isfinite(score), name, ": piece ", n_pieces - 1, " has the score ", score);
        }
      }
    } else if (field->number == 2) {
      FieldReader trainer(field->data, name);
      while (const auto part = trainer.next()) {
        if (part->number == 3 && part->wire_type == 0) model_type = part->value;
      }
    } else if (field->number == 3 || field->number == 5) {
      FieldReader normalizer(field->data, name);
      while (const auto part = normalizer.next()) {
        if (part->number == 2 && part->wire_type == 2) check_charsmap(part->data, name);
      }
    }
  }
  ROTUNDA_CHECK(n_pieces > 0, name, ": not a SentencePiece model (no pieces)");
  const char* const kTypes[] = {"0", "unigram", "BPE", "word", "char"};
  ROTUNDA_CHECK(model_type == 2, name, ": model type ", model_type < 5 ? kTypes[model_type] : "unknown",
                " is not supported, only BPE is");
}

}  // namespace rotunda::io::tokenizer
