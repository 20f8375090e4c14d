#include "kv/kv_spec.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "base/error.h"
#include "kv/kv_registry.h"

namespace rotunda::kv {
namespace {

std::string error_of(const std::string& text) {
  try {
    for (const KvSpec& spec : parse_kv_specs(text)) kv_registry().get(spec.format).validate(spec);
  } catch (const Error& error) {
    EXPECT_EQ(error.fault(), Fault::kUser);
    return error.what();
  }
  return "";
}

TEST(KvSpecTest, ReadsFormatsAndOptions) {
  const KvSpec spec = parse_kv_spec("rotate2:recent=64,sinks=20,clip=0.8");
  EXPECT_EQ(spec.format, "rotate2");
  EXPECT_EQ(spec.options, (std::map<std::string, std::string>{{"recent", "64"}, {"sinks", "20"}, {"clip", "0.8"}}));
  EXPECT_EQ(spec.to_string(), "rotate2:clip=0.8,recent=64,sinks=20");
  EXPECT_EQ(parse_kv_spec(spec.to_string()), spec);
}

TEST(KvSpecTest, ReadsLists) {
  const auto specs = parse_kv_specs("bf16,rotate2:recent=0,sinks=4,fp16,rotate3:clip=1.0");
  ASSERT_EQ(specs.size(), 4u);
  EXPECT_EQ(specs[1].to_string(), "rotate2:recent=0,sinks=4");
  EXPECT_EQ(specs[2].to_string(), "fp16");
  EXPECT_EQ(specs[3].to_string(), "rotate3:clip=1.0");
}

TEST(KvSpecTest, RefusesWhatItCannotRead) {
  const std::pair<const char*, const char*> cases[] = {
      {"", "format name"},
      {",bf16", "format name"},
      {"bf16,", "format name"},
      {"recent=3", "format name first"},
      {"rotate2:", "KEY=VALUE"},
      {"rotate2:recent", "KEY=VALUE"},
      {"rotate2:recent=", "recent"},
      {"rotate2:=5", "option name"},
      {"rotate2:recent=1,recent=2", "given twice"},
      {"rotate2:recent=1:2", "recent"},
      {"Rotate2", "format name"},
      {"rotate2:Recent=3", "option name"},
      {"nosuch", "rotunda2, rotunda3, rotunda4"},
      {"rotate2:recent=-1", "recent=-1"},
      {"rotate2:recent=1e9", "recent=1e9"},
      {"rotate2:recent=99999999999999999999", "recent"},
      {"rotate2:clip=0", "clip=0"},
      {"rotate2:clip=nan", "clip=nan"},
      {"rotate2:clip=1.5", "clip=1.5"},
      {"rotate2:zero=float", "code, minimum"},
      {"rotate2:reorder=heads", "layer, group, none"},
      {"rotate2:group=0", "group=0"},
      {"rotate2:window=5", "unknown"},
      {"bf16:recent=5", "no options"},
  };
  for (const auto& [text, fragment] : cases) EXPECT_THAT(error_of(text), ::testing::HasSubstr(fragment)) << text;
}

}  // namespace
}  // namespace rotunda::kv
