// Damaged and unsupported tokenizer files: one line that names file and part, never a crash; and inputs that must not
// take long.

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <chrono>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>

#include "base/error.h"
#include "io/tokenizer/regex.h"
#include "io/tokenizer/tokenizer.h"

namespace rotunda::io {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;
using testing::AllOf;
using testing::HasSubstr;
using testing::Not;

const fs::path kGolden = fs::path(ROTUNDA_SOURCE_DIR) / "tests/golden/tokenizers";

std::string read_all(const fs::path& path) {
  std::ifstream in(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(in), {}};
}

class DamagedTest : public testing::Test {
 protected:
  DamagedTest() {
    folder_ = fs::path(testing::TempDir()) /
              ("rotunda_tok_" + std::string(testing::UnitTest::GetInstance()->current_test_info()->name()));
    fs::create_directories(folder_);
  }
  ~DamagedTest() override { fs::remove_all(folder_); }

  void write(const std::string& name, const std::string& bytes) {
    std::ofstream(folder_ / name, std::ios::binary | std::ios::trunc) << bytes;
  }
  std::string error() {
    try {
      load_tokenizer(folder_);
    } catch (const Error& e) {
      EXPECT_EQ(e.fault(), Fault::kUser) << e.what();
      EXPECT_THAT(e.what(), Not(HasSubstr("\n")));
      return e.what();
    }
    return "no error";
  }
  std::string error_of(const std::string& bytes) {
    write("tokenizer.json", bytes);
    return error();
  }
  template <typename Edit>
  std::string error_after(const Edit& edit) {
    json document = json::parse(read_all(kGolden / "llama2_like/tokenizer.json"));
    edit(document);
    return error_of(document.dump());
  }
  fs::path folder_;
};

TEST_F(DamagedTest, JsonFiles) {
  EXPECT_THAT(error(), HasSubstr("neither tokenizer.json nor tokenizer.model"));
  EXPECT_THAT(error_of(""), HasSubstr("tokenizer.json: not valid JSON"));
  EXPECT_THAT(error_of("[]"), HasSubstr("expected an object"));
  EXPECT_THAT(error_of("{}"), HasSubstr("\"model\" is missing"));
  EXPECT_THAT(error_of("{\"model\": \"\xFF\"}"), HasSubstr("not valid JSON"));
  EXPECT_THAT(error_of(std::string(300000, '[')), HasSubstr("tokenizer.json"));
  EXPECT_THAT(error_of(std::string(300000, '[') + std::string(300000, ']')), HasSubstr("deeper than"));
  const std::string whole = read_all(kGolden / "llama2_like/tokenizer.json");
  for (size_t n = 1; n < whole.size(); n += whole.size() / 40) EXPECT_THAT(error_of(whole.substr(0, n)), HasSubstr("not valid JSON"));
}

TEST_F(DamagedTest, VocabularyAndMerges) {
  EXPECT_EQ(error_after([](json&) {}), "no error");
  EXPECT_THAT(error_after([](json& j) { j["model"]["vocab"]["x9"] = 1000000000000; }), AllOf(HasSubstr("model.vocab"), HasSubstr("1000000000000")));
  EXPECT_THAT(error_after([](json& j) { j["model"]["vocab"]["x9"] = -1; }), HasSubstr("id -1"));
  EXPECT_THAT(error_after([](json& j) { j["model"]["vocab"]["x9"] = 1.5; }), HasSubstr("expected an integer"));
  EXPECT_THAT(error_after([](json& j) { j["model"]["vocab"]["x9"] = 3; }), HasSubstr("id 3 belongs to"));
  EXPECT_THAT(error_after([](json& j) { j["model"]["merges"].push_back({"nope", "x"}); }), HasSubstr("\"nope\" is not in the vocabulary"));
  EXPECT_THAT(error_after([](json& j) { j["model"]["merges"].push_back("a b c"); }), HasSubstr("one blank"));
  EXPECT_THAT(error_after([](json& j) { j["model"]["merges"].push_back(7); }), HasSubstr("model.merges["));
  EXPECT_THAT(error_after([](json& j) { j["model"]["unk_token"] = "nope"; }), HasSubstr("model.unk_token"));
  EXPECT_THAT(error_after([](json& j) { j["model"]["dropout"] = 0.1; }), HasSubstr("dropout"));
  EXPECT_THAT(error_after([](json& j) { j["added_tokens"][0]["id"] = 1000000000000; }), HasSubstr("added_tokens[0]"));
  EXPECT_THAT(error_after([](json& j) { j["added_tokens"][0]["id"] = 7; }), HasSubstr("has id 7, expected 0"));
  EXPECT_THAT(error_after([](json& j) { j["added_tokens"].push_back(j["added_tokens"][0]); }), HasSubstr("twice"));
}

TEST_F(DamagedTest, UnsupportedParts) {
  for (const char* type : {"Unigram", "WordPiece", "WordLevel", "?"}) {
    EXPECT_THAT(error_after([&](json& j) { j["model"]["type"] = type; }), AllOf(HasSubstr("tokenizer.json: model"), HasSubstr(type)));
  }
  const auto other = [&](const char* part) {
    return error_after([&](json& j) { j[part] = {{"type", "Strange"}}; });
  };
  for (const char* part : {"normalizer", "pre_tokenizer", "decoder", "post_processor"}) {
    EXPECT_THAT(other(part), AllOf(HasSubstr(std::string("tokenizer.json: ") + part), HasSubstr("\"Strange\" is not supported")));
  }
  const auto pattern = [&](const char* regex) {
    return error_after([&](json& j) {
      j["pre_tokenizer"] = {{"type", "Split"}, {"pattern", {{"Regex", regex}}}, {"behavior", "Isolated"}, {"invert", false}};
    });
  };
  for (const char* bad : {"(", "[a", "[a&&b]", "[a[b]]", "a{2", "*", "\\", "(?<x>a)\\k<x>", "\\p{Nope}", "(?x) a", "(*SKIP)"}) {
    if (std::string(bad) == "a{2") {
      EXPECT_EQ(pattern(bad), "no error") << "a brace alone is itself";
    } else {
      EXPECT_THAT(pattern(bad), HasSubstr("pre_tokenizer.pattern.Regex")) << bad;
    }
  }
}

TEST_F(DamagedTest, SentencePieceFiles) {
  const std::string whole = read_all(kGolden / "sp_nfkc/tokenizer.model");
  write("tokenizer.model", whole);
  EXPECT_EQ(error(), "no error");
  write("tokenizer.model", "");
  EXPECT_THAT(error(), HasSubstr("tokenizer.model: empty"));
  for (size_t n = 1; n < whole.size(); n += whole.size() / 50) {
    write("tokenizer.model", whole.substr(0, n));
    EXPECT_THAT(error(), HasSubstr("tokenizer.model")) << n;
  }
  // One byte wrong, all over the file: an error or a working tokenizer, never a crash.
  for (size_t i = 0; i < whole.size(); i += whole.size() / 150) {
    std::string bytes = whole;
    bytes[i] = static_cast<char>(bytes[i] ^ 0xA5);
    write("tokenizer.model", bytes);
    try {
      const auto tokenizer = load_tokenizer(folder_);
      tokenizer->decode(tokenizer->encode("Hello \xEF\xAC\x81 \xE2\x84\xA6 world", true), false);
    } catch (const Error& e) {
      EXPECT_EQ(e.fault(), Fault::kUser) << e.what();
    }
  }
}

TEST(LongRunsTest, AMegabyteOfOneCharacter) {
  using clock = std::chrono::steady_clock;
  for (const char* name : {"llama3_like", "gpt2_like", "llama2_like", "metaspace_always", "sp_tiny"}) {
    const auto tokenizer = load_tokenizer(kGolden / name);
    for (const char c : {' ', 'a', '\n'}) {
      const std::string text(1 << 20, c);
      const auto start = clock::now();
      const auto ids = tokenizer->encode(text, false);
      EXPECT_FALSE(ids.empty());
      // Hugging Face itself gives a run of blanks back one shorter, or as U+2581, with some of these.
      if (c != ' ') {
        EXPECT_EQ(tokenizer->decode(ids, false).size(), text.size()) << name << " '" << c << "'";
      }
      EXPECT_LT(clock::now() - start, std::chrono::seconds(60)) << name << " '" << c << "'";
    }
  }
}

TEST(RegexTest, OnigurumaReadsAsPcre2) {
  EXPECT_EQ(tokenizer::translate_oniguruma(R"((?i:'s)|\p{N}{1,3}|(?m:.))", "x"), R"((?i:'s)|\p{N}{1,3}|(?s:.))");
  // Ruby's interval with a plus is no possessive one.
  EXPECT_EQ(tokenizer::translate_oniguruma("(ab){2}+c", "x"), "(?:(ab){2})+c");
  const tokenizer::Regex blank(R"(\s)", "x");
  EXPECT_FALSE(blank.find_all("\xE1\xA0\x8E").front().is_match) << "U+180E is no white space";
  EXPECT_TRUE(blank.find_all("\xC2\x85").front().is_match) << "U+0085 is";
  EXPECT_EQ(tokenizer::Regex("x*", "x").find_all("axb").size(), 5u);  // empty, a, x, b, empty
}

}  // namespace
}  // namespace rotunda::io
