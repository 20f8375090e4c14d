#include "kv/kv_spec.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "base/error.h"
#include "kv/kv_registry.h"

namespace rotunda::kv {
namespace {

std::string error_of(const std::string& text) {
  try {
    for (const KvSpec& spec : parse_kv_specs(text)) kv_registry().get(spec).validate(spec);
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

TEST(KvSpecTest, ReadsMixesOfLayers) {
  const KvSpec spec = parse_kv_spec(" layers 0, 1,-1 = bf16 ;layers 4-6,-4--3=rotate2:recent=0,sinks=4; rotunda2:recent=32 ");
  EXPECT_EQ(spec.format, kMixFormat);
  ASSERT_EQ(spec.parts.size(), 3u);
  EXPECT_EQ(spec.parts[0].layers, (std::vector<LayerRange>{{0, 0}, {1, 1}, {-1, -1}}));
  EXPECT_EQ(spec.parts[1].layers, (std::vector<LayerRange>{{4, 6}, {-4, -3}}));
  EXPECT_EQ(spec.parts[1].spec, parse_kv_spec("rotate2:sinks=4,recent=0"));
  EXPECT_TRUE(spec.parts[2].layers.empty());
  EXPECT_EQ(spec.to_string(), "layers 0,1,-1=bf16;layers 4-6,-4--3=rotate2:recent=0,sinks=4;rotunda2:recent=32");
  EXPECT_EQ(parse_kv_spec(spec.to_string()), spec);
}

TEST(KvSpecTest, MixesStandInLists) {
  const auto specs = parse_kv_specs(
      "bf16,layers 0,1 = bf16; rotunda2:recent=32,sinks=0,layers 0=fp16;layers 1-3=rotunda3:recent=7,first=0,k=rotunda3,v=rotunda2,fp32");
  ASSERT_EQ(specs.size(), 5u);
  EXPECT_EQ(specs[1].to_string(), "layers 0,1=bf16;rotunda2:recent=32,sinks=0");
  EXPECT_EQ(specs[2].to_string(), "layers 0=fp16;layers 1-3=rotunda3:first=0,recent=7");
  EXPECT_EQ(specs[3].to_string(), "rotunda3:values=2");
  EXPECT_EQ(specs[4].to_string(), "fp32");
}

TEST(KvSpecTest, KeysAndValuesApartAreOneSpecWhereAFormatHasBoth) {
  EXPECT_EQ(parse_kv_spec("k=rotunda3,v=rotunda2").to_string(), "rotunda3:values=2");
  EXPECT_EQ(parse_kv_spec("k=rotunda2:recent=32,first=0,v=rotunda4").to_string(), "rotunda2:first=0,recent=32,values=4");
  EXPECT_EQ(parse_kv_spec("k=rotunda2:recent=32,v=rotunda4:recent=32").to_string(), "rotunda2:recent=32,values=4");
  EXPECT_EQ(parse_kv_spec("k=quarot2:group=32,v=int4").to_string(), "quarot2:group=32,values=int4");
  EXPECT_EQ(parse_kv_spec("k=bfp4,v=turbo2").to_string(), "bfp4:values=turbo2");
  EXPECT_EQ(parse_kv_spec("k=bf16,v=bf16").to_string(), "bf16");
  EXPECT_EQ(parse_kv_spec("layers 0=k=rotunda4,v=rotunda2;k=rotunda3,v=rotunda2").to_string(),
            "layers 0=rotunda4:values=2;rotunda3:values=2");
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
      {"layers 0=bf16;", "format name ''"},
      {"layers 0=bf16;rotunda2;fp16", "got 'fp16' after the format of the remaining layers"},
      {"rotunda2;layers 0=bf16", "got ';layers 0=bf16', expected 'layers N,... = FORMAT' in front"},
      {"layers 0,1;rotunda2", "expected layers N,N-M,... = FORMAT"},
      {"layers =bf16;rotunda2", "got '', expected a layer's number"},
      {"layers one=bf16;rotunda2", "got 'one'"},
      {"layers 0-=bf16;rotunda2", "got '0-'"},
      {"layers 0-1-2=bf16;rotunda2", "got '0-1-2'"},
      {"layers 99999999999=bf16;rotunda2", "got '99999999999'"},
      {"layers 0=nosuch;rotunda2", "'nosuch' is unknown"},
      {"layers 0=bf16;rotunda2:recent=-1", "recent=-1"},
      {"layers 0=layers 1=bf16;rotunda2", "expected a format name first"},
      {"mix", "'mix' is unknown"},
      {"k=rotunda3", "got 'k=rotunda3' alone, expected k=SPEC,v=SPEC"},
      {"v=rotunda3,k=rotunda2", "got 'v=rotunda3', expected k=SPEC,v=SPEC"},
      {"k=rotunda3,v=rotate2", "keys of rotunda3 do not go with values of rotate2, expected values of rotunda2, rotunda3, rotunda4, and no other"},
      {"k=bf16,v=rotunda2", "keys of bf16 do not go with values of rotunda2, expected values of bf16,"},
      {"k=fp8,v=int4", "keys of fp8 do not go with values of int4, expected values of fp8, mxfp8,"},
      {"k=rotunda3,v=nosuch", "'nosuch' is unknown"},
      {"k=rotunda3:recent=0,v=rotunda2:recent=1", "do not go with"},
      {"k=rotunda3:values=2,v=rotunda2", "do not go with"},
      {"rotunda2:k=3", "option name 'k', which stands for keys or values"},
  };
  for (const auto& [text, fragment] : cases) EXPECT_THAT(error_of(text), ::testing::HasSubstr(fragment)) << text;
}

}  // namespace
}  // namespace rotunda::kv
