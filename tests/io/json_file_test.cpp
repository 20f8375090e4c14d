#include "io/json_file.h"

#include <gmock/gmock.h>

#include <nlohmann/json.hpp>

#include "io/sha256.h"
#include "io_test_util.h"

namespace rotunda::io {
namespace {

using ::testing::HasSubstr;
using testing::message_of;
using ::testing::StartsWith;
using testing::TempFolder;
using testing::write_file;

std::string refusal(std::string_view text) {
  return message_of(Fault::kUser, [&] { parse_json(text, "config.json"); });
}

TEST(ReadJson, Values) {
  const TempFolder folder;
  write_file(folder / "f", "\xef\xbb\xbf{\"a\": [1, -2, 2.5, true, null, \"\\u00fc\"], \"b\": 1, \"b\": 2}\n");
  const nlohmann::json json = read_json(folder / "f");
  EXPECT_EQ(json["a"][2].get<double>(), 2.5);
  EXPECT_EQ(json["a"][5].get<std::string>(), "ü");
  EXPECT_EQ(json["b"].get<int>(), 2);
}

TEST(ReadJson, UnreadableFiles) {
  const TempFolder folder;
  EXPECT_EQ(message_of(Fault::kWorld, [&] { read_json(folder / "none"); }),
            (folder / "none").string() + ": cannot open: No such file or directory");
  EXPECT_EQ(message_of(Fault::kWorld, [&] { read_json(folder.path()); }),
            folder.path().string() + ": cannot read: it is a folder");
}

TEST(ReadJson, ErrorNamesFileLineAndColumn) {
  const TempFolder folder;
  write_file(folder / "f", "{\n  \"a\": 1,\n  \"b\": oops\n}\n");
  EXPECT_THAT(message_of(Fault::kUser, [&] { read_json(folder / "f"); }),
              StartsWith((folder / "f").string() + ":3:8: not JSON: syntax error"));
}

TEST(ParseJson, Places) {
  EXPECT_THAT(refusal(""), StartsWith("config.json:1:1: not JSON: "));
  EXPECT_THAT(refusal("{\"a\":1"), StartsWith("config.json:1:7: not JSON: "));
  EXPECT_THAT(refusal("\n\n}"), StartsWith("config.json:3:1: not JSON: "));
  EXPECT_THAT(refusal("{} x"), StartsWith("config.json:1:4: not JSON: "));
  EXPECT_THAT(refusal("[1,\n2,]"), StartsWith("config.json:2:3: not JSON: "));
  EXPECT_THAT(refusal("{\"a\": NaN}"), StartsWith("config.json:1:7: not JSON: "));
}

TEST(ParseJson, AwkwardText) {
  EXPECT_THAT(refusal(std::string("{}\0{", 4)), HasSubstr("config.json:1:3: not JSON: byte 0"));
  EXPECT_THAT(refusal("\"\xff\""), HasSubstr("UTF-8"));
  EXPECT_THAT(refusal("[1e999]"), HasSubstr("number overflow"));
  EXPECT_LT(refusal("\"" + std::string(1 << 20, 'x')).size(), 400u);
}

TEST(ParseJson, Depth) {
  const auto nested = [](int depth) { return std::string(depth, '[') + std::string(depth, ']'); };
  const nlohmann::json deepest = parse_json(nested(kMaxJsonDepth), "f");
  EXPECT_EQ(nlohmann::json(deepest), deepest);
  EXPECT_THAT(refusal("\n" + nested(kMaxJsonDepth + 1)),
              StartsWith("config.json:2:257: nested deeper than 256 levels"));
  EXPECT_THAT(refusal(std::string(1 << 22, '[')), HasSubstr("nested deeper"));
  // Brackets in strings and side by side are not depth.
  EXPECT_NO_THROW(parse_json("[\"" + std::string(1000, '[') + "\\\"[[\"]", "f"));
  std::string wide = "[0";
  for (int i = 0; i < 1000; ++i) wide += ",[{}]";
  EXPECT_EQ(parse_json(wide + "]", "f").size(), 1001u);
}

TEST(Sha256, PublishedVectors) {  // FIPS 180-4 examples
  Sha256 empty;
  EXPECT_EQ(to_hex(empty.finish()), "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
  Sha256 pieces;
  pieces.update("a");
  pieces.update("");
  pieces.update("bc");
  EXPECT_EQ(to_hex(pieces.finish()), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
}

}  // namespace
}  // namespace rotunda::io
