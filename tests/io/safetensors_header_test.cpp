#include "io/safetensors_header.h"

#include <gmock/gmock.h>

#include <algorithm>

#include "base/check.h"
#include "io/safetensors.h"
#include "io_test_util.h"

namespace rotunda::io {
namespace {

using ::testing::HasSubstr;
using testing::message_of;
using testing::safetensors_bytes;
using testing::TempFolder;
using testing::write_file;

struct Damage {
  const char* name;
  std::string file;
  const char* message;  ///< a part of what must be said
};

std::ostream& operator<<(std::ostream& out, const Damage& damage) { return out << damage.name; }

// The header padded with blanks, so that the data begin at this byte of the file.
std::string header_until(std::string header, size_t data_start, size_t data_bytes) {
  header.resize(std::max(header.size(), data_start - 8), ' ');
  return safetensors_bytes(header, std::string(data_bytes, '\0'));
}

std::string header_only(const std::string& header, size_t data_bytes = 0) {
  return safetensors_bytes(header, std::string(data_bytes, '\0'));
}

// One tensor `a` with these fields; the data begin at byte 100.
std::string one(const std::string& fields, size_t data_bytes = 4) {
  return header_until("{\"a\":{" + fields + "}}", 100, data_bytes);
}

// F32 tensors `a` and `b` of one element at these offsets; the data begin at byte 200.
std::string pair_at(const std::string& a, const std::string& b, size_t data_bytes = 8) {
  const auto entry = [](const std::string& offsets) {
    return "{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":" + offsets + "}";
  };
  return header_until("{\"a\":" + entry(a) + ",\"b\":" + entry(b) + "}", 200, data_bytes);
}

std::vector<Damage> damages() {
  const std::string good = R"("dtype":"F32","shape":[1],"data_offsets":[0,4])";
  std::vector<Damage> cases = {
      {"empty", "", "f: file has 0 bytes, expected at least 8"},
      {"seven_bytes", std::string(7, '\0'), "f: file has 7 bytes, expected at least 8"},
      {"length_beyond_end", std::string("\x09\0\0\0\0\0\0\0{}", 10), "f: header ends at byte 17, file has 10"},
      {"length_beyond_limit", std::string("\x01\xe1\xf5\x05\0\0\0\0{}", 10),
       "header length is 100000001, at most 100000000"},
      {"length_of_64_bits", std::string(8, '\xff') + "{}", "header length is 18446744073709551615"},
      {"text_file", "version https://git-lfs.github.com/spec/v1", "not a safetensors file"},
      {"length_zero", std::string(8, '\0'), "header does not begin with '{'"},
      {"blank_first", header_only(" {}"), "header does not begin with '{'"},
      {"list", header_only("[1]"), "header does not begin with '{'"},
      {"number", header_only("7"), "header does not begin with '{'"},
      {"not_json", header_only("{nonsense}"), "header is not JSON at its byte 3: "},
      {"cut", header_only("{\"a\":{"), "header is not JSON at its byte 7: syntax error"},
      {"two_documents", header_only("{}{}"), "header is not JSON at its byte 3"},
      {"trailing_comma", header_only("{\"a\":1,}"), "tensor a: is 1, expected an object"},
      {"bad_utf8", header_only("{\"\xff\":{}}"), "header is not JSON"},
      {"number_beyond_double", one(R"("dtype":"F32","shape":[1e999],"data_offsets":[0,4])"), "header is not JSON"},
      {"entry_is_list", header_only("{\"a\":[]}"), "tensor a: is a list, expected an object"},
      {"entry_is_null", header_only("{\"a\":null}"), "tensor a: is null, expected an object"},
      {"entry_is_string", header_only("{\"a\":\"F32\"}"), "tensor a: is a string, expected an object"},
      {"unknown_field", one(good + ",\"scale\":1"), "tensor a: unknown field scale"},
      {"no_dtype", one(R"("shape":[1],"data_offsets":[0,4])"), "tensor a: dtype is missing"},
      {"no_shape", one(R"("dtype":"F32","data_offsets":[0,4])"), "tensor a: shape is missing"},
      {"no_offsets", one(R"("dtype":"F32","shape":[1])"), "tensor a: data_offsets is missing"},
      {"no_fields", header_only("{\"a\":{}}"), "tensor a: dtype is missing"},
      {"unknown_dtype", one(R"("dtype":"F8_E4M3","shape":[4],"data_offsets":[0,4])"),
       "tensor a: dtype is F8_E4M3, expected one of F64 F32 F16 BF16 I64 I32 I16 I8 U8 BOOL"},
      {"small_letters", one(R"("dtype":"f32","shape":[1],"data_offsets":[0,4])"), "tensor a: dtype is f32"},
      {"dtype_number", one(R"("dtype":32,"shape":[1],"data_offsets":[0,4])"),
       "tensor a: dtype is 32, expected a string"},
      {"dtype_list", one(R"("dtype":["F32"],"shape":[1],"data_offsets":[0,4])"), "tensor a: dtype is a list"},
      {"shape_number", one(R"("dtype":"F32","shape":1,"data_offsets":[0,4])"), "tensor a: shape is 1, expected a list"},
      {"shape_object", one(R"("dtype":"F32","shape":{},"data_offsets":[0,4])"), "tensor a: shape is an object"},
      {"negative_shape", one(R"("dtype":"F32","shape":[-1],"data_offsets":[0,4])"), "tensor a: shape holds -1"},
      {"fractional_shape", one(R"("dtype":"F32","shape":[1.0],"data_offsets":[0,4])"), "tensor a: shape holds 1.0"},
      {"string_in_shape", one(R"("dtype":"F32","shape":["1"],"data_offsets":[0,4])"), "tensor a: shape holds a string"},
      {"nested_shape", one(R"("dtype":"F32","shape":[[1]],"data_offsets":[0,4])"), "tensor a: shape holds a list"},
      {"bool_in_shape", one(R"("dtype":"F32","shape":[true],"data_offsets":[0,4])"), "tensor a: shape holds a boolean"},
      {"huge_size", one(R"("dtype":"F32","shape":[18446744073709551615],"data_offsets":[0,4])"),
       "tensor a: shape holds 18446744073709551615"},
      {"beyond_64_bits", one(R"("dtype":"F32","shape":[18446744073709551616],"data_offsets":[0,4])"),
       "tensor a: shape holds 18446744073709551616"},
      // 2^32 * 2^32 * 4 is 0 in 64 bits, 2^31 * 2^31 * 4 is 2^64.
      {"overflow_to_zero", one(R"("dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,0])", 0),
       "tensor a: shape [4294967296, 4294967296] of F32 overflows 64 bits"},
      {"overflow_by_itemsize", one(R"("dtype":"F32","shape":[2147483648,2147483648],"data_offsets":[0,0])", 0),
       "overflows"},
      {"overflow_behind_zero", one(R"("dtype":"F32","shape":[4294967296,0,4294967296],"data_offsets":[0,0])", 0),
       "overflows 64 bits"},
      {"offsets_number", one(R"("dtype":"F32","shape":[1],"data_offsets":4)"), "data_offsets is 4, expected a list"},
      {"offset_strings", one(R"("dtype":"F32","shape":[1],"data_offsets":["0","4"])"), "data_offsets holds a string"},
      {"offset_null", one(R"("dtype":"F32","shape":[1],"data_offsets":[null,4])"), "data_offsets holds null"},
      {"offset_negative", one(R"("dtype":"F32","shape":[1],"data_offsets":[-4,0])"), "data_offsets holds -4"},
      {"offset_huge", one(R"("dtype":"F32","shape":[1],"data_offsets":[18446744073709551612,18446744073709551615])"),
       "data_offsets holds 18446744073709551612"},
      {"one_offset", one(R"("dtype":"F32","shape":[1],"data_offsets":[4])"), "data_offsets has 1 numbers, expected 2"},
      {"three_offsets", one(R"("dtype":"F32","shape":[1],"data_offsets":[0,4,8])"),
       "data_offsets has more than 2 numbers"},
      {"begin_after_end", one(R"("dtype":"F32","shape":[1],"data_offsets":[4,0])"),
       "tensor a: data_offsets begin at 4, after their end 0"},
      {"too_few_bytes", one(R"("dtype":"F32","shape":[2],"data_offsets":[0,4])"),
       "tensor a: shape [2] of F32 is 8 bytes, data_offsets hold 4"},
      {"too_many_bytes", one(R"("dtype":"BF16","shape":[],"data_offsets":[0,4])"),
       "tensor a: shape [] of BF16 is 2 bytes, data_offsets hold 4"},
      {"beyond_end", one(good, 3), "f: tensor a: ends at byte 104, file has 103"},
      {"no_data", one(good, 0), "tensor a: ends at byte 104, file has 100"},
      {"trailing_bytes", one(good, 5), "f: the last tensor ends at byte 104, file has 105"},
      {"trailing_bytes_no_tensor", header_only("{}", 1), "the last tensor ends at byte 10, file has 11"},
      {"gap_at_start", pair_at("[4,8]", "[8,12]", 12), "tensor a: begins at byte 204, leaves a gap from byte 200"},
      {"gap_between", pair_at("[0,4]", "[8,12]", 12), "tensor b: begins at byte 208, leaves a gap from byte 204"},
      {"same_bytes", pair_at("[0,4]", "[0,4]", 4),
       "tensor b: begins at byte 200, overlaps tensor a, which ends at byte 204"},
      {"overlap", pair_at("[0,4]", "[2,6]", 6), "tensor b: begins at byte 202, overlaps tensor a"},
      {"overlap_other_order", pair_at("[2,6]", "[0,4]", 6), "tensor a: begins at byte 202, overlaps tensor b"},
      {"tensor_twice", header_only("{\"a\":{" + good + "},\"a\":{" + good + "}}", 4), "tensor a: listed twice"},
      {"dtype_twice", one(good + ",\"dtype\":\"F32\""), "tensor a: dtype is given twice"},
      {"offsets_twice", one(good + ",\"data_offsets\":[0,4]"), "tensor a: data_offsets is given twice"},
      {"metadata_twice", header_only(R"({"__metadata__":{},"__metadata__":{}})"), "__metadata__: listed twice"},
      {"metadata_key_twice", header_only(R"({"__metadata__":{"k":"1","k":"2"}})"), "metadata k: given twice"},
      {"metadata_list", header_only(R"({"__metadata__":[]})"), "__metadata__ is a list, expected an object"},
      {"metadata_number", header_only(R"({"__metadata__":{"k":1}})"), "metadata k: is 1, expected a string"},
      {"metadata_object", header_only(R"({"__metadata__":{"k":{}}})"), "metadata k: is an object, expected a string"},
      {"newline_in_name", header_only(R"({"a\nb":1})"), R"(tensor a\x0ab: is 1)"},
      {"long_name", header_only("{\"" + std::string(5000, 'n') + "\":1}"), "nnn...: is 1"},
  };
  std::string nul = "{}  ";
  nul[2] = '\0';
  cases.push_back({"nul_behind_object", header_only(nul), "header is not JSON at its byte 3: byte 0"});
  std::string dims = "1";
  for (int i = 0; i < 64; ++i) dims += ",1";
  cases.push_back({"dims_65", one(R"("dtype":"F32","data_offsets":[0,4],"shape":[)" + dims + "]"),
                   "tensor a: shape has more than 64 numbers"});
  cases.push_back({"brackets", header_only("{\"a\":" + std::string(1 << 20, '[')), "tensor a: is a list"});
  return cases;
}

class DamagedHeader : public ::testing::TestWithParam<Damage> {};

TEST_P(DamagedHeader, InMemoryIsRefused) {
  const std::string message = message_of(Fault::kUser, [] { parse_safetensors(GetParam().file, "f"); });
  EXPECT_THAT(message, HasSubstr(GetParam().message));
  EXPECT_THAT(message, ::testing::StartsWith("f: "));
  EXPECT_LT(message.size(), 600u);
}

TEST_P(DamagedHeader, OnDiskIsRefused) {
  const TempFolder folder;
  write_file(folder / "f", GetParam().file);
  const std::string message = message_of(Fault::kUser, [&] { SafetensorsFile::open(folder / "f"); });
  EXPECT_THAT(message, HasSubstr(GetParam().message));
  EXPECT_THAT(message, ::testing::StartsWith((folder / "f").string() + ": "));
}

INSTANTIATE_TEST_SUITE_P(Table, DamagedHeader, ::testing::ValuesIn(damages()),
                         [](const auto& info) { return std::string(info.param.name); });

TEST(SafetensorsHeader, EveryPrefixOfAFileIsRefused) {
  const std::string whole = testing::read_file(testing::golden("all_dtypes.safetensors"));
  ASSERT_NO_THROW(parse_safetensors(whole, "f"));
  for (size_t n = 0; n < whole.size(); ++n) {
    EXPECT_THROW(parse_safetensors(std::string_view(whole).substr(0, n), "f"), Error) << n;
  }
}

TEST(SafetensorsHeader, MessageNamesFileTensorGotAndExpected) {
  const std::string header = R"({"model.norm.weight":{"dtype":"U8","shape":[8900],"data_offsets":[0,8900]}})";
  const int64_t data_bytes = 8192 - 8 - static_cast<int64_t>(header.size());
  EXPECT_EQ(message_of(Fault::kUser, [&] { parse_safetensors_header(header, data_bytes, "model.safetensors"); }),
            concat("model.safetensors: tensor model.norm.weight: ends at byte ", 8 + header.size() + 8900,
                   ", file has 8192"));
}

TEST(SafetensorsHeader, EmptyTensorsMayShareAPlace) {
  const std::string header = R"({"z":{"dtype":"F32","shape":[0,3],"data_offsets":[2,2]},)"
                             R"("a":{"dtype":"I8","shape":[2],"data_offsets":[0,2]},)"
                             R"("y":{"dtype":"F64","shape":[0],"data_offsets":[2,2]},)"
                             R"("x":{"dtype":"U8","shape":[1,1,1],"data_offsets":[2,3]}} )";
  const SafetensorsHeader parsed = parse_safetensors_header(header, 3, "f");
  ASSERT_EQ(parsed.entries.size(), 4u);
  const int64_t start = 8 + static_cast<int64_t>(header.size());
  EXPECT_EQ(parsed.entries.at("x").begin_byte, start + 2);
  EXPECT_EQ(parsed.entries.at("x").end_byte, start + 3);
  EXPECT_EQ(parsed.entries.at("z").begin_byte, parsed.entries.at("z").end_byte);
  EXPECT_EQ(parsed.entries.at("z").shape, (std::vector<int64_t>{0, 3}));
  EXPECT_EQ(parsed.entries.at("z").dtype, at::kFloat);
}

TEST(SafetensorsHeader, FieldsInAnyOrderAndEmptyNames) {
  const std::string header = R"({"":{"data_offsets":[0,2],"shape":[],"dtype":"BF16"},"__metadata__":{"":"v"}})";
  const SafetensorsHeader parsed = parse_safetensors_header(header, 2, "f");
  EXPECT_EQ(parsed.entries.at("").dtype, at::kBFloat16);
  EXPECT_TRUE(parsed.entries.at("").shape.empty());
  EXPECT_EQ(parsed.metadata.at(""), "v");
}

TEST(SafetensorsHeader, NoTensors) {
  EXPECT_TRUE(parse_safetensors_header("{}", 0, "f").entries.empty());
  EXPECT_TRUE(parse_safetensors_header("{}   ", 0, "f").metadata.empty());
}

TEST(SafetensorsHeader, DtypeNames) {
  EXPECT_EQ(safetensors_dtype_name(at::kBFloat16), "BF16");
  EXPECT_EQ(safetensors_dtype_name(at::kLong), "I64");
  EXPECT_EQ(safetensors_dtype_name(at::kComplexFloat), "");
}

}  // namespace
}  // namespace rotunda::io
