#include "io/safetensors.h"

#include <gmock/gmock.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/stat.h>

#include <nlohmann/json.hpp>

#include "io/json_file.h"
#include "io/safetensors_header.h"
#include "io_test_util.h"

namespace rotunda::io {
namespace {

using testing::golden;
using ::testing::HasSubstr;
using testing::message_of;
using testing::read_file;
using testing::TempFolder;
using testing::write_file;

std::string hex_of(const at::Tensor& tensor) {
  static const char* digits = "0123456789abcdef";
  std::string text;
  const auto* bytes = static_cast<const uint8_t*>(tensor.const_data_ptr());
  for (size_t i = 0; i < tensor.nbytes(); ++i) text += {digits[bytes[i] >> 4], digits[bytes[i] & 15]};
  return text;
}

bool same_bytes(const at::Tensor& a, const at::Tensor& b) {
  return a.scalar_type() == b.scalar_type() && a.sizes() == b.sizes() &&
         hex_of(a.contiguous()) == hex_of(b.contiguous());
}

void expect_golden(const ops::TensorBundle& bundle, const nlohmann::json& expected) {
  EXPECT_EQ(bundle.tensors.size(), expected.size());
  for (const auto& [name, want] : expected.items()) {
    SCOPED_TRACE(name);
    ASSERT_EQ(bundle.tensors.count(name), 1u);
    const at::Tensor& tensor = bundle.tensors.at(name);
    EXPECT_EQ(safetensors_dtype_name(tensor.scalar_type()), want["dtype"].get<std::string>());
    EXPECT_EQ(tensor.sizes().vec(), want["shape"].get<std::vector<int64_t>>());
    EXPECT_TRUE(tensor.is_contiguous());
    EXPECT_EQ(hex_of(tensor), want["hex"].get<std::string>());
  }
}

size_t files_in(const TempFolder& folder) {
  return static_cast<size_t>(std::distance(std::filesystem::directory_iterator(folder.path()), {}));
}

TEST(ReadBundle, EqualsWhatTheReferenceLibraryWrote) {
  const ops::TensorBundle bundle = read_bundle(golden("all_dtypes.safetensors"));
  expect_golden(bundle, read_json(golden("golden.json"))["all_dtypes"]);
  EXPECT_EQ(bundle.metadata, (std::map<std::string, std::string>{{"rotunda.format", "golden ü"}}));
  EXPECT_EQ(bundle.origin, golden("all_dtypes.safetensors").string());
}

TEST(ReadBundle, MisalignedTensorsAreCopied) {
  const ops::TensorBundle bundle = read_bundle(golden("misaligned.safetensors"));
  expect_golden(bundle, read_json(golden("golden.json"))["misaligned"]);
  for (const auto& [name, tensor] : bundle.tensors) {
    EXPECT_EQ(reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % tensor.element_size(), 0u) << name;
  }
  EXPECT_EQ(bundle.tensors.at("y").item<int64_t>(), -5);
}

TEST(ReadBundle, TensorsOutliveTheFileObjectAndTheName) {
  const TempFolder folder;
  write_bundle(folder / "f", {.tensors = {{"a", at::arange(1000)}}, .metadata = {}});
  at::Tensor tensor = SafetensorsFile::open(folder / "f")->tensor("a").slice(0, 990);
  std::filesystem::remove(folder / "f");
  EXPECT_EQ(tensor.sum().item<int64_t>(), 9945);  // 990 + ... + 999
}

TEST(ReadBundle, IsAViewOfTheMapping) {
  const auto file = SafetensorsFile::open(golden("all_dtypes.safetensors"));
  EXPECT_EQ(file->tensor("f32").const_data_ptr(), file->tensor("f32").const_data_ptr());
}

TEST(SafetensorsFile, UnknownTensor) {
  const auto file = SafetensorsFile::open(golden("all_dtypes.safetensors"));
  EXPECT_EQ(message_of(Fault::kUser, [&] { file->tensor("g\n"); }),
            golden("all_dtypes.safetensors").string() + ": tensor g\\x0a is missing");
}

TEST(SafetensorsFile, BoolThatIsNeitherZeroNorOne) {
  const TempFolder folder;
  write_file(folder / "f", testing::safetensors_bytes(R"({"m":{"dtype":"BOOL","shape":[3],"data_offsets":[0,3]}})",
                                                      std::string("\0\1\2", 3)));
  const auto file = SafetensorsFile::open(folder / "f");
  EXPECT_THAT(message_of(Fault::kUser, [&] { file->tensor("m"); }),
              HasSubstr("tensor m: byte 2 of BOOL is 2, expected 0 or 1"));
}

TEST(SafetensorsFile, MissingFileAndFolder) {
  const TempFolder folder;
  EXPECT_EQ(message_of(Fault::kWorld, [&] { SafetensorsFile::open(folder / "none"); }),
            (folder / "none").string() + ": cannot open: No such file or directory");
  EXPECT_THAT(message_of(Fault::kUser, [&] { SafetensorsFile::open(folder.path()); }),
              HasSubstr("is not a regular file"));
}

TEST(SafetensorsFile, PipeIsRefusedNotWaitedFor) {
  const TempFolder folder;
  ASSERT_EQ(::mkfifo((folder / "pipe").c_str(), 0600), 0);
  EXPECT_THAT(message_of(Fault::kUser, [&] { SafetensorsFile::open(folder / "pipe"); }),
              HasSubstr("is not a regular file"));
}

class RoundTrip : public ::testing::TestWithParam<at::ScalarType> {};

TEST_P(RoundTrip, AwkwardShapesAndStrides) {
  const auto options = at::TensorOptions().dtype(GetParam());
  const at::Tensor base =
      at::arange(120, at::kInt).remainder(GetParam() == at::kBool ? 2 : 101).to(options).reshape({2, 3, 4, 5});
  ops::TensorBundle bundle;
  bundle.tensors = {{"contiguous", base},
                    {"transposed", base.permute({3, 1, 0, 2})},
                    {"sliced", base.slice(3, 1, 5, 2)},
                    {"expanded", base.slice(2, 0, 1).expand({2, 3, 7, 5})},
                    {"offset", base.flatten().slice(0, 7)},
                    {"scalar", base.flatten()[1]},
                    {"one", base.flatten().slice(0, 1, 2)},
                    {"empty", at::empty({3, 0, 2}, options)},
                    {"", base},
                    {"odd \"name\"\n\t\\ ü 漢", base.flatten()}};
  bundle.metadata = {{"rotunda.format", "x"}, {"", ""}, {"text", "line\nbreak \"quote\" ü"}};
  const TempFolder folder;
  write_bundle(folder / "f", bundle);
  const ops::TensorBundle back = read_bundle(folder / "f");
  EXPECT_EQ(back.metadata, bundle.metadata);
  ASSERT_EQ(back.tensors.size(), bundle.tensors.size());
  for (const auto& [name, tensor] : bundle.tensors) EXPECT_TRUE(same_bytes(tensor, back.tensors.at(name))) << name;
  EXPECT_EQ(files_in(folder), 1u);
}

INSTANTIATE_TEST_SUITE_P(Dtypes, RoundTrip,
                         ::testing::Values(at::kDouble, at::kFloat, at::kHalf, at::kBFloat16, at::kLong, at::kInt,
                                           at::kShort, at::kChar, at::kByte, at::kBool),
                         [](const auto& info) { return std::string(safetensors_dtype_name(info.param)); });

TEST(WriteBundle, BytesEqualTheReferenceLibrary) {
  const TempFolder folder;
  for (const char* name : {"all_dtypes.safetensors", "single/model.safetensors"}) {
    write_bundle(folder / "f", read_bundle(golden(name)));
    EXPECT_EQ(read_file(folder / "f"), read_file(golden(name))) << name;
  }
}

TEST(WriteBundle, EveryTensorIsAligned) {
  ops::TensorBundle bundle;
  const auto odd = [](at::ScalarType dtype) { return at::ones({3}, at::TensorOptions().dtype(dtype)); };
  bundle.tensors = {{"a", odd(at::kByte)}, {"b", odd(at::kHalf)}, {"c", odd(at::kDouble)}, {"d", odd(at::kFloat)},
                    {"e", odd(at::kBool)}, {"f", odd(at::kLong)}, {"g", odd(at::kShort)},  {"h", odd(at::kInt)}};
  const TempFolder folder;
  for (int extra = 0; extra < 9; ++extra) {  // whatever the length of the header
    bundle.metadata = {{"k", std::string(extra, 'x')}};
    write_bundle(folder / "f", bundle);
    const auto file = SafetensorsFile::open(folder / "f");
    for (const auto& [name, entry] : file->entries()) {
      EXPECT_EQ(entry.begin_byte % static_cast<int64_t>(c10::elementSize(entry.dtype)), 0) << name << extra;
    }
  }
}

TEST(WriteBundle, NothingToWrite) {
  const TempFolder folder;
  write_bundle(folder / "f", {});
  EXPECT_TRUE(read_bundle(folder / "f").tensors.empty());
  EXPECT_TRUE(read_bundle(folder / "f").metadata.empty());
}

TEST(WriteBundle, OverTheFileThatItReads) {
  const TempFolder folder;
  write_bundle(folder / "f", {.tensors = {{"a", at::arange(5000)}}, .metadata = {}});
  ops::TensorBundle bundle = read_bundle(folder / "f");
  bundle.tensors.emplace("b", at::ones({3}));
  write_bundle(folder / "f", bundle);
  EXPECT_TRUE(at::equal(bundle.tensors.at("a"), at::arange(5000)));
  EXPECT_TRUE(at::equal(read_bundle(folder / "f").tensors.at("a"), at::arange(5000)));
}

TEST(WriteBundle, NewFilesFollowTheUmask) {
  const TempFolder folder;
  const mode_t old = ::umask(027);
  write_bundle(folder / "f", {});
  ::umask(old);
  struct stat status;
  ASSERT_EQ(::stat((folder / "f").c_str(), &status), 0);
  EXPECT_EQ(status.st_mode & 0777, 0640u);
}

TEST(WriteBundle, NegativeViews) {
  const at::Tensor complex = at::complex(at::ones({4}), at::arange(4, at::kFloat));
  const at::Tensor negative = at::imag(complex.conj());
  ASSERT_TRUE(negative.is_neg());
  const TempFolder folder;
  write_bundle(folder / "f", {.tensors = {{"a", negative}}, .metadata = {}});
  EXPECT_TRUE(at::equal(read_bundle(folder / "f").tensors.at("a"), -at::arange(4, at::kFloat)));
}

TEST(WriteBundle, WhatTheFormatCannotHold) {
  const TempFolder folder;
  const auto refuse = [&](const std::string& name, const at::Tensor& tensor) {
    return message_of(Fault::kUser, [&] { write_bundle(folder / "f", {.tensors = {{name, tensor}}, .metadata = {}}); });
  };
  EXPECT_THAT(refuse("a", at::ones({2}, at::kComplexFloat)),
              HasSubstr("tensor a: safetensors has no Strided ComplexFloat"));
  EXPECT_THAT(refuse("a", at::ones({2, 2}).to_sparse()), HasSubstr("tensor a: safetensors has no Sparse"));
  EXPECT_THAT(refuse("a", at::Tensor()), HasSubstr("tensor a: it is undefined"));
  EXPECT_THAT(refuse("__metadata__", at::ones({2})), HasSubstr("__metadata__"));
  EXPECT_THAT(refuse("\xff", at::ones({2})), HasSubstr("not UTF-8"));
  EXPECT_EQ(files_in(folder), 0u);
}

TEST(WriteBundle, MissingFolder) {
  const TempFolder folder;
  EXPECT_EQ(message_of(Fault::kWorld, [&] { write_bundle(folder / "no/f", {}); }),
            (folder / "no/f").string() + ": cannot write: No such file or directory");
}

TEST(WriteBundle, TargetIsAFolder) {
  const TempFolder folder;
  std::filesystem::create_directory(folder / "f");
  EXPECT_THAT(message_of(Fault::kWorld, [&] { write_bundle(folder / "f", {}); }), HasSubstr("cannot write: "));
  EXPECT_EQ(files_in(folder), 1u);  // the temporary file is gone
  EXPECT_THAT(message_of(Fault::kUser, [&] { write_bundle(folder / "f/", {}); }), HasSubstr("not the name of a file"));
}

TEST(WriteBundle, ReadOnlyFolder) {
  if (::geteuid() == 0) GTEST_SKIP() << "root may write to read-only folders";
  const TempFolder folder;
  ASSERT_EQ(::chmod(folder.path().c_str(), 0500), 0);
  EXPECT_THAT(message_of(Fault::kWorld, [&] { write_bundle(folder / "f", {}); }), HasSubstr("Permission denied"));
  ::chmod(folder.path().c_str(), 0700);
  EXPECT_EQ(files_in(folder), 0u);
}

TEST(WriteBundle, PseudoFileSystemRefuses) {  // as a read-only folder, for root too
  EXPECT_THAT(message_of(Fault::kWorld, [] { write_bundle("/proc/rotunda.safetensors", {}); }),
              HasSubstr("/proc/rotunda.safetensors: cannot write: "));
}

TEST(WriteBundle, FullDiskLeavesTheOldFile) {
  // A limit on the size of files fails as a full disk does: in the middle of write().
  const TempFolder folder;
  write_bundle(folder / "f", {.tensors = {{"a", at::ones({4})}}, .metadata = {}});
  const std::string before = read_file(folder / "f");
  const auto write_beyond_the_limit = [&] {
    const struct rlimit limit = {100000, 100000};
    ::setrlimit(RLIMIT_FSIZE, &limit);
    ::signal(SIGXFSZ, SIG_IGN);
    const ops::TensorBundle bundle = {.tensors = {{"a", at::ones({1 << 20})}}, .metadata = {}};
    const std::string message = message_of(Fault::kWorld, [&] { write_bundle(folder / "f", bundle); });
    ::_exit(message == (folder / "f").string() + ": cannot write: File too large" ? 7 : 1);
  };
  EXPECT_EXIT(write_beyond_the_limit(), ::testing::ExitedWithCode(7), "");
  EXPECT_EQ(read_file(folder / "f"), before);
  EXPECT_EQ(files_in(folder), 1u);
}

}  // namespace
}  // namespace rotunda::io
