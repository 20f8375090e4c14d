#include "io/tokenizer/regex.h"

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include <cstdint>

#include "base/check.h"
#include "io/tokenizer/utf8.h"

namespace rotunda::io::tokenizer {
namespace {

// A hostile pattern must end in an error, a long run of one character must not: the longest honest case, 1 MB of blanks
// under `\s*[\r\n]+`, needs about one step a byte.
constexpr uint32_t kMatchLimit = 50'000'000;
constexpr uint32_t kHeapLimitKib = 512 * 1024;
constexpr size_t kJitStackBytes = size_t{64} << 20;  // reserved, not touched, until a pattern needs it
constexpr size_t kMaxPatternBytes = 64 * 1024;

// Members of the classes as Oniguruma has them (tried out over all of Unicode). PCRE2's own differ: its \s takes in
// U+180E, its \w has no marks. The superscripts and fractions of Latin-1 count as words there, the others do not.
constexpr std::string_view kSpaceMembers =
    R"(\x{9}-\x{d}\x{20}\x{85}\x{a0}\x{1680}\x{2000}-\x{200a}\x{2028}\x{2029}\x{202f}\x{205f}\x{3000})";
constexpr std::string_view kNotSpaceMembers =
    R"(\x{0}-\x{8}\x{e}-\x{1f}\x{21}-\x{84}\x{86}-\x{9f}\x{a1}-\x{167f}\x{1681}-\x{1fff}\x{200b}-\x{2027}\x{202a}-\x{202e}\x{2030}-\x{205e}\x{2060}-\x{2fff}\x{3001}-\x{10ffff})";
constexpr std::string_view kWordMembers = R"(\p{Alphabetic}\p{M}\p{Nd}\p{Pc}\x{b2}\x{b3}\x{b9}\x{bc}-\x{be})";
constexpr std::string_view kHexMembers = "0-9a-fA-F";

class Translator {
 public:
  Translator(std::string_view pattern, const std::string& where) : in_(pattern), where_(where) {}

  std::string run() {
    while (pos_ < in_.size()) step();
    return std::move(out_);
  }

 private:
  [[noreturn]] void fail(const std::string& what) const {
    throw_user_error(concat(where_, ": pattern \"", in_.substr(0, 80), "\": ", what, " is not supported"));
  }
  char peek(size_t ahead = 0) const { return pos_ + ahead < in_.size() ? in_[pos_ + ahead] : '\0'; }

  // An atom is what a quantifier behind it applies to.
  void begin_atom() { atom_ = out_.size(); }

  void step() {
    const char c = in_[pos_];
    if (c == '\\') {
      begin_atom();
      escape(/*in_class=*/false);
    } else if (c == '[') {
      begin_atom();
      char_class();
    } else if (c == '(') {
      groups_.push_back(out_.size());
      open_group();
    } else if (c == ')') {
      out_ += c;
      ++pos_;
      if (!groups_.empty()) {
        atom_ = groups_.back();
        groups_.pop_back();
      }
    } else if (c == '{') {
      interval();
    } else {
      if (c != '?' && c != '*' && c != '+') begin_atom();
      size_t size = 1;
      if (static_cast<unsigned char>(c) >= 0x80) size = code_point_at(in_, pos_).size_bytes;
      out_ += in_.substr(pos_, size);
      pos_ += size;
    }
  }

  void open_group() {
    out_ += '(';
    ++pos_;
    if (peek() != '?') {
      if (peek() == '*') fail("a PCRE2 verb (*...)");
      return;
    }
    // Options up to ':' or ')'. Ruby's m is the dot matching newlines, PCRE2's s.
    size_t end = pos_ + 1;
    while (end < in_.size() && (std::string_view("imx-").find(in_[end]) != std::string_view::npos)) ++end;
    if (end > pos_ + 1 && end < in_.size() && (in_[end] == ':' || in_[end] == ')')) {
      if (in_.substr(pos_, end - pos_).find('x') != std::string_view::npos) fail("the option (?x)");
      out_ += '?';
      for (size_t i = pos_ + 1; i < end; ++i) out_ += in_[i] == 'm' ? 's' : in_[i];
      pos_ = end;
      if (in_[pos_] == ':') {
        out_ += ':';
        ++pos_;
      }
      return;
    }
    const char kind = peek(1);
    if (std::string_view(":=!><#").find(kind) == std::string_view::npos) fail(std::string("the group (?") + kind);
    if (kind == '#') {  // a comment: nothing in it is a pattern
      const size_t close = in_.find(')', pos_);
      pos_ = close == std::string_view::npos ? in_.size() : close;
      out_ += "?:";
      return;
    }
    out_ += '?';
    ++pos_;
    out_ += kind;
    ++pos_;
    if (kind == '<' && (peek() == '=' || peek() == '!')) {
      out_ += peek();
      ++pos_;
    }
  }

  void interval() {
    // {n}, {n,}, {n,m}, {,m}; anything else is a plain brace.
    size_t p = pos_ + 1;
    const auto digits = [&] {
      const size_t from = p;
      while (p < in_.size() && in_[p] >= '0' && in_[p] <= '9') ++p;
      return std::string(in_.substr(from, p - from));
    };
    std::string low = digits();
    std::string high = low;
    if (p < in_.size() && in_[p] == ',') {
      ++p;
      high = digits();
      if (low.empty() && !high.empty()) low = "0";
      if (!low.empty()) low += ',' + high;
    }
    if (low.empty() || p >= in_.size() || in_[p] != '}') {
      begin_atom();
      out_ += "\\{";
      ++pos_;
      return;
    }
    pos_ = p + 1;
    out_ += '{' + low + '}';
    if (peek() == '+') {  // Ruby: one or more times the interval; PCRE2 would read it as possessive
      out_.insert(atom_, "(?:");
      out_ += ')';
    }
  }

  void escape(bool in_class) {
    const char e = peek(1);
    if (pos_ + 1 >= in_.size()) fail("a lone \\ at the end");
    const auto members = [&](std::string_view set, bool negated) {
      pos_ += 2;
      if (in_class) {
        out_ += set;
      } else {
        out_ += negated ? "[^" : "[";
        out_ += set;
        out_ += ']';
      }
    };
    switch (e) {
      case 's':
        return members(kSpaceMembers, false);
      case 'S':
        return in_class ? members(kNotSpaceMembers, false) : members(kSpaceMembers, true);
      case 'w':
        return members(kWordMembers, false);
      case 'W':
        if (in_class) fail("\\W inside [...]");
        return members(kWordMembers, true);
      case 'h':
        return members(kHexMembers, false);
      case 'H':
        if (in_class) fail("\\H inside [...]");
        return members(kHexMembers, true);
      case 'b':
      case 'B': {
        if (in_class) {
          if (e == 'B') fail("\\B inside [...]");
          break;  // backspace in both
        }
        const std::string word = concat('[', kWordMembers, ']');
        out_ += e == 'b' ? concat("(?:(?<=", word, ")(?!", word, ")|(?<!", word, ")(?=", word, "))")
                         : concat("(?:(?<=", word, ")(?=", word, ")|(?<!", word, ")(?!", word, "))");
        pos_ += 2;
        return;
      }
      case 'u': {
        const std::string_view hex = in_.substr(pos_ + 2, 4);
        if (hex.size() != 4 || hex.find_first_not_of("0123456789abcdefABCDEF") != std::string_view::npos) fail("\\u without four hexadecimal digits");
        out_ += concat("\\x{", hex, '}');
        pos_ += 6;
        return;
      }
      case 'g':
      case 'k':
      case 'Q':
      case 'E':
      case 'C':
      case 'M':
      case 'c':
      case 'N':
      case 'O':
      case 'y':
      case 'Y':
        fail(std::string("\\") + e);
      default:
        break;
    }
    size_t size = 1;
    if (static_cast<unsigned char>(e) >= 0x80) size = code_point_at(in_, pos_ + 1).size_bytes;
    if ((e == 'p' || e == 'P' || e == 'x') && peek(2) == '{') {  // these braces are no interval
      const size_t close = in_.find('}', pos_);
      if (close == std::string_view::npos) fail(std::string("\\") + e + "{ without }");
      size = close - pos_;
    }
    out_ += in_.substr(pos_, 1 + size);
    pos_ += 1 + size;
  }

  void char_class() {
    out_ += '[';
    ++pos_;
    if (peek() == '^') {
      out_ += '^';
      ++pos_;
    }
    if (peek() == ']') {  // first in the class it is a member
      out_ += "\\]";
      ++pos_;
    }
    while (pos_ < in_.size() && in_[pos_] != ']') {
      if (in_[pos_] == '\\') {
        escape(/*in_class=*/true);
      } else if (in_[pos_] == '[') {
        fail("a class inside [...]");
      } else if (in_[pos_] == '&' && peek(1) == '&') {
        fail("the intersection && inside [...]");
      } else {
        out_ += in_[pos_++];
      }
    }
    if (pos_ >= in_.size()) fail("[ without ]");
    out_ += ']';
    ++pos_;
  }

  std::string_view in_;
  const std::string& where_;
  std::string out_;
  size_t pos_ = 0;
  size_t atom_ = 0;             // where in out_ the last atom begins
  std::vector<size_t> groups_;  // where in out_ each open group begins
};

struct FreeStack {
  void operator()(pcre2_jit_stack* s) const { pcre2_jit_stack_free(s); }
};

pcre2_jit_stack* thread_jit_stack(void*) {
  thread_local const std::unique_ptr<pcre2_jit_stack, FreeStack> stack(
      pcre2_jit_stack_create(64 * 1024, kJitStackBytes, nullptr));
  return stack.get();
}

}  // namespace

std::string translate_oniguruma(std::string_view pattern, const std::string& where) {
  return Translator(pattern, where).run();
}

struct Regex::Program {
  Program(const std::string& pcre2_pattern, std::string where_in, std::string_view shown) : where(std::move(where_in)) {
    ROTUNDA_CHECK(shown.size() <= kMaxPatternBytes, where, ": pattern of ", shown.size(), " bytes, at most ",
                  kMaxPatternBytes);
    int error = 0;
    PCRE2_SIZE offset = 0;
    const std::unique_ptr<pcre2_compile_context, void (*)(pcre2_compile_context*)> context(
        pcre2_compile_context_create(nullptr), pcre2_compile_context_free);
    pcre2_set_newline(context.get(), PCRE2_NEWLINE_LF);
    pcre2_set_parens_nest_limit(context.get(), 100);
    code = pcre2_compile(reinterpret_cast<PCRE2_SPTR>(pcre2_pattern.data()), pcre2_pattern.size(),
                         PCRE2_UTF | PCRE2_UCP | PCRE2_MULTILINE, &error, &offset, context.get());
    if (code == nullptr) {
      PCRE2_UCHAR message[256] = {};
      pcre2_get_error_message(error, message, sizeof message);
      throw_user_error(concat(where, ": pattern \"", shown.substr(0, 80), "\": ", reinterpret_cast<const char*>(message)));
    }
    // Where the machine allows no executable memory the interpreter does the same work, only slower.
    has_jit = pcre2_jit_compile(code, PCRE2_JIT_COMPLETE) == 0;
    match_context = pcre2_match_context_create(nullptr);
    ROTUNDA_CHECK_WORLD(match_context != nullptr, where, ": out of memory for a pattern");
    pcre2_set_match_limit(match_context, kMatchLimit);
    pcre2_set_heap_limit(match_context, kHeapLimitKib);
    if (has_jit) pcre2_jit_stack_assign(match_context, &thread_jit_stack, nullptr);
  }
  ~Program() {
    pcre2_match_context_free(match_context);
    pcre2_code_free(code);
  }
  Program(const Program&) = delete;
  Program& operator=(const Program&) = delete;

  std::string where;
  pcre2_code* code = nullptr;
  pcre2_match_context* match_context = nullptr;
  bool has_jit = false;
};

Regex::Regex(std::string_view pattern, const std::string& where)
    : program_(std::make_shared<const Program>(translate_oniguruma(pattern, where), where, pattern)) {}

Regex Regex::from_pcre2(std::string_view pattern) {
  return Regex(std::make_shared<const Program>(std::string(pattern), "built-in", pattern));
}

std::vector<Span> Regex::find_all(std::string_view text) const {
  std::vector<Span> spans;
  if (text.empty()) {
    spans.push_back({0, 0, false});
    return spans;
  }
  const std::unique_ptr<pcre2_match_data, void (*)(pcre2_match_data*)> data(
      pcre2_match_data_create_from_pattern(program_->code, nullptr), pcre2_match_data_free);
  ROTUNDA_CHECK_WORLD(data != nullptr, program_->where, ": out of memory for a match");
  const auto* subject = reinterpret_cast<PCRE2_SPTR>(text.data());
  size_t covered = 0;    // end of the last match
  size_t start = 0;      // where the next search begins
  bool matched = false;  // whether there was a last match
  while (start <= text.size()) {
    // Text was checked as a whole once; checking it again in each call would be quadratic.
    int rc = pcre2_match(program_->code, subject, text.size(), start, PCRE2_NO_UTF_CHECK, data.get(),
                         program_->match_context);
    if (rc == PCRE2_ERROR_JIT_STACKLIMIT) {
      rc = pcre2_match(program_->code, subject, text.size(), start, PCRE2_NO_UTF_CHECK | PCRE2_NO_JIT, data.get(),
                       program_->match_context);
    }
    if (rc == PCRE2_ERROR_NOMATCH) break;
    if (rc < 0) {
      PCRE2_UCHAR message[256] = {};
      pcre2_get_error_message(rc, message, sizeof message);
      throw_user_error(concat(program_->where, ": the pattern fails on byte ", start, " of a text of ", text.size(),
                              " bytes: ", reinterpret_cast<const char*>(message)));
    }
    const PCRE2_SIZE* offsets = pcre2_get_ovector_pointer(data.get());
    const size_t begin = offsets[0];
    const size_t end = offsets[1];
    // \K inside a lookahead can put the begin behind the end, or before what is covered.
    ROTUNDA_CHECK(begin <= end && begin >= covered, program_->where, ": the pattern moves its match with \\K");
    // An empty match right behind the last one is passed over, one character on.
    if (begin == end && matched && end == covered) {
      if (start >= text.size()) break;
      start = std::max(start, end);
      if (start >= text.size()) break;
      start += code_point_at(text, start).size_bytes;
      continue;
    }
    if (begin > covered) spans.push_back({covered, begin, false});
    spans.push_back({begin, end, true});
    covered = end;
    start = end;
    matched = true;
  }
  if (covered < text.size()) spans.push_back({covered, text.size(), false});
  return spans;
}

}  // namespace rotunda::io::tokenizer
