// Every tokenizer of tests/golden/tokenizers against what Hugging Face answered (make_tokenizer_golden.py).

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <map>
#include <nlohmann/json.hpp>
#include <sstream>

#include "io/tokenizer/tokenizer.h"

namespace rotunda::io {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;

const fs::path kRoot = ROTUNDA_SOURCE_DIR;
const fs::path kGolden = kRoot / "tests/golden/tokenizers";

std::string read_all(const fs::path& path) {
  std::ifstream in(path, std::ios::binary);
  std::stringstream out;
  out << in.rdbuf();
  EXPECT_TRUE(in.good()) << path;
  return out.str();
}

class Fnv {
 public:
  void add(unsigned char b) { hash_ = (hash_ ^ b) * 0x100000001B3u; }
  std::string hex() const {
    char text[17];
    std::snprintf(text, sizeof text, "%016llx", static_cast<unsigned long long>(hash_));
    return text;
  }

 private:
  uint64_t hash_ = 0xCBF29CE484222325u;
};

std::string hash_of(const std::vector<int64_t>& ids) {
  Fnv fnv;
  for (const int64_t id : ids) {
    for (int b = 0; b < 8; ++b) fnv.add(static_cast<unsigned char>(id >> (8 * b)));
  }
  return fnv.hex();
}

std::string hash_of(const std::string& text) {
  Fnv fnv;
  for (const char c : text) fnv.add(static_cast<unsigned char>(c));
  return fnv.hex();
}

const std::map<std::string, std::string>& texts() {
  static const auto all = [] {
    std::map<std::string, std::string> out;
    for (const json& row : json::parse(read_all(kGolden / "texts.json"))) {
      const std::string hex = row["hex"];
      std::string unit;
      for (size_t i = 0; i < hex.size(); i += 2) unit += static_cast<char>(std::stoi(hex.substr(i, 2), nullptr, 16));
      std::string& text = out[row["name"]];
      for (int i = 0; i < row["times"].get<int>(); ++i) text += unit;
    }
    return out;
  }();
  return all;
}

std::string streamed(const Tokenizer& tokenizer, const std::vector<int64_t>& ids) {
  StreamDecoder stream(tokenizer);
  std::string out;
  for (const int64_t id : ids) out += stream.push(id);
  return out + stream.finish();
}

void expect_text(const std::string& got, const json& want, const std::string& what) {
  if (want.contains("text")) {
    EXPECT_EQ(got, want["text"].get<std::string>()) << what;
  } else {
    EXPECT_EQ(got.size(), want["bytes"].get<size_t>()) << what;
    EXPECT_EQ(hash_of(got), want["hash"]) << what;
  }
}

class GoldenTest : public testing::TestWithParam<std::string> {
 protected:
  void SetUp() override {
    golden_ = json::parse(read_all(kGolden / (GetParam() + ".json")));
    const fs::path folder = kRoot / golden_["model"].get<std::string>();
    if (GetParam() == "small_mha" && !fs::exists(folder)) GTEST_SKIP() << "models/small-mha is not in the repository";
    tokenizer_ = load_tokenizer(folder);
  }
  json golden_;
  std::unique_ptr<const Tokenizer> tokenizer_;
};

TEST_P(GoldenTest, Sizes) {
  EXPECT_EQ(tokenizer_->vocab_size(), golden_["vocab_size"].get<int64_t>());
  const auto id = [&](const char* key) { return golden_[key].is_null() ? std::nullopt : std::optional(golden_[key].get<int64_t>()); };
  EXPECT_EQ(tokenizer_->bos_id(), id("bos_id"));
  EXPECT_EQ(tokenizer_->eos_id(), id("eos_id"));
}

TEST_P(GoldenTest, AwkwardTexts) {
  for (const json& row : golden_["texts"]) {
    const std::string name = row["name"];
    const std::vector<int64_t> plain = tokenizer_->encode(texts().at(name), false);
    EXPECT_EQ(plain.size(), row["n"].get<size_t>()) << name;
    EXPECT_EQ(hash_of(plain), row["hash"]) << name;
    if (row.contains("ids")) {
      EXPECT_EQ(plain, row["ids"].get<std::vector<int64_t>>()) << name;
    }
    const std::vector<int64_t> full = tokenizer_->encode(texts().at(name), true);
    EXPECT_EQ(full.size(), row["n_special"].get<size_t>()) << name;
    EXPECT_EQ(hash_of(full), row["hash_special"]) << name;
    expect_text(tokenizer_->decode(full, false), row["decoded"], name);
    const std::string skipped = tokenizer_->decode(full, true);
    expect_text(skipped, row["decoded_skip"], name + " (skip)");
    if (full.size() < 5000) {
      EXPECT_EQ(streamed(*tokenizer_, full), skipped) << name << " (streamed)";
    }
  }
}

TEST_P(GoldenTest, OddIds) {
  for (const json& row : golden_["decode"]) {
    const auto ids = row["ids"].get<std::vector<int64_t>>();
    expect_text(tokenizer_->decode(ids, false), row["decoded"], row["ids"].dump());
    expect_text(tokenizer_->decode(ids, true), row["decoded_skip"], row["ids"].dump() + " (skip)");
  }
}

TEST_P(GoldenTest, WikiText) {
  const std::vector<int64_t> ids = tokenizer_->encode(read_all(kRoot / "assets/wikitext2_test_head.txt"), true);
  EXPECT_EQ(ids.size(), golden_["head"]["n"].get<size_t>());
  EXPECT_EQ(hash_of(ids), golden_["head"]["hash"]);
}

std::vector<std::string> names() {
  std::vector<std::string> out;
  for (const auto& entry : fs::directory_iterator(kGolden)) {
    if (entry.path().extension() == ".json" && entry.path().stem() != "texts") out.push_back(entry.path().stem());
  }
  std::sort(out.begin(), out.end());
  return out;
}

INSTANTIATE_TEST_SUITE_P(All, GoldenTest, testing::ValuesIn(names()), [](const auto& info) { return info.param; });

}  // namespace
}  // namespace rotunda::io
