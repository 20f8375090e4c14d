#include "io/checkpoint_index.h"

#include <gmock/gmock.h>

#include <nlohmann/json.hpp>

#include "base/check.h"
#include "io_test_util.h"

namespace rotunda::io {
namespace {

using ::testing::AllOf;
using testing::golden;
using ::testing::HasSubstr;
using testing::message_of;
using testing::TempFolder;
using testing::write_file;

void write_tensors(const std::filesystem::path& path, const std::vector<std::string>& names) {
  ops::TensorBundle bundle;
  for (const std::string& name : names) bundle.tensors.emplace(name, at::full({2}, static_cast<double>(names.size())));
  write_bundle(path, bundle);
}

void write_index(const TempFolder& folder, const std::string& weight_map) {
  write_file(folder / "model.safetensors.index.json", "{\"metadata\":{},\"weight_map\":" + weight_map + "}");
}

std::string refusal(const TempFolder& folder) {
  const std::string message = message_of(Fault::kUser, [&] { CheckpointIndex::open(folder.path()); });
  EXPECT_THAT(message, ::testing::StartsWith(folder.path().string()));
  return message;
}

TEST(CheckpointIndex, SingleAndShardedAreTheSame) {
  const auto expected = read_json(golden("golden.json"));
  for (const char* name : {"single", "sharded"}) {
    SCOPED_TRACE(name);
    const CheckpointIndex index = CheckpointIndex::open(golden(name));
    EXPECT_EQ(index.names(), (std::vector<std::string>{"bias", "layer.0.weight", "layer.1.weight", "layer.2.weight"}));
    EXPECT_EQ(index.total_bytes(), 5 * 4 + 3 * 12 * 2);
    EXPECT_TRUE(index.contains("bias"));
    EXPECT_FALSE(index.contains("bia"));
    EXPECT_EQ(index.entry("layer.2.weight").dtype, at::kBFloat16);
    EXPECT_EQ(index.entry("layer.2.weight").shape, (std::vector<int64_t>{3, 4}));
    EXPECT_TRUE(
        at::equal(index.tensor("layer.2.weight").to(at::kFloat), at::arange(0, 36, 3, at::kFloat).reshape({3, 4})));
    EXPECT_EQ(index.content_hash(), expected["model_content_hash"].get<std::string>());
    EXPECT_EQ(index.model_dir(), golden(name));
  }
}

TEST(CheckpointIndex, AbsentTensorNamesFolderAndTensor) {
  const CheckpointIndex index = CheckpointIndex::open(golden("sharded"));
  const std::string expected = golden("sharded").string() + ": tensor lm_head.weight is missing";
  EXPECT_EQ(message_of(Fault::kUser, [&] { index.tensor("lm_head.weight"); }), expected);
  EXPECT_EQ(message_of(Fault::kUser, [&] { index.entry("lm_head.weight"); }), expected);
}

TEST(CheckpointIndex, HashSeesEveryPartOfATensor) {
  const TempFolder folder;
  const auto hash = [&](const std::string& name, const at::Tensor& tensor) {
    write_bundle(folder / "model.safetensors", {.tensors = {{name, tensor}}, .metadata = {}});
    return CheckpointIndex::open(folder.path()).content_hash();
  };
  const at::Tensor tensor = at::arange(6, at::kInt);
  const std::string base = hash("a", tensor);
  EXPECT_EQ(base.size(), 64u);
  EXPECT_EQ(base, hash("a", tensor.clone()));
  EXPECT_NE(base, hash("b", tensor));
  EXPECT_NE(base, hash("a", tensor.reshape({2, 3})));
  EXPECT_NE(base, hash("a", tensor.view(at::kFloat)));
  EXPECT_NE(base, hash("a", tensor + 1));
  EXPECT_NE(hash("a", at::empty({0, 1})), hash("a", at::empty({1, 0})));
}

TEST(CheckpointIndex, HashDoesNotSeeMetadataOrAlignment) {
  const CheckpointIndex single = CheckpointIndex::open(golden("single"));
  ops::TensorBundle bundle;
  for (const std::string& name : single.names()) bundle.tensors.emplace(name, single.tensor(name));
  bundle.metadata = {{"note", "other"}};
  const TempFolder folder;
  write_bundle(folder / "model.safetensors", bundle);
  EXPECT_EQ(CheckpointIndex::open(folder.path()).content_hash(), single.content_hash());
  std::filesystem::copy_file(golden("misaligned.safetensors"), folder / "model.safetensors",
                             std::filesystem::copy_options::overwrite_existing);
  const std::string misaligned = CheckpointIndex::open(folder.path()).content_hash();
  write_bundle(folder / "model.safetensors", read_bundle(golden("misaligned.safetensors")));
  EXPECT_EQ(CheckpointIndex::open(folder.path()).content_hash(), misaligned);
}

TEST(CheckpointIndex, ManyShardsAndTensors) {
  const TempFolder folder;
  nlohmann::json weight_map;
  for (int shard = 0; shard < 37; ++shard) {
    const std::string file = concat("part-", shard, ".safetensors");
    ops::TensorBundle bundle;
    for (int i = 0; i < 5; ++i) {
      const std::string name = concat("t", shard * 5 + i);
      bundle.tensors.emplace(name, at::full({i}, shard * 5 + i));
      weight_map[name] = file;
    }
    write_bundle(folder / file, bundle);
  }
  write_index(folder, weight_map.dump());
  const CheckpointIndex index = CheckpointIndex::open(folder.path());
  EXPECT_EQ(index.names().size(), 185u);
  for (int i = 0; i < 185; ++i) {
    EXPECT_TRUE(at::equal(index.tensor(concat("t", i)), at::full({i % 5}, i))) << i;
  }
  EXPECT_EQ(index.content_hash(), CheckpointIndex::open(folder.path()).content_hash());
}

TEST(CheckpointIndex, SingleFileGoesFirst) {
  const TempFolder folder;
  write_tensors(folder / "model.safetensors", {"a"});
  write_index(folder, R"({"b":"gone.safetensors"})");
  EXPECT_EQ(CheckpointIndex::open(folder.path()).names(), std::vector<std::string>{"a"});
}

TEST(CheckpointIndex, NoFolderNoWeights) {
  const TempFolder folder;
  EXPECT_EQ(message_of(Fault::kUser, [&] { CheckpointIndex::open(folder / "none"); }),
            (folder / "none").string() + ": no such folder");
  write_file(folder / "file", "");
  EXPECT_THAT(message_of(Fault::kUser, [&] { CheckpointIndex::open(folder / "file"); }), HasSubstr("is not a folder"));
  EXPECT_EQ(refusal(folder),
            folder.path().string() + ": has neither model.safetensors nor model.safetensors.index.json");
  write_file(folder / "pytorch_model.bin", "");
  EXPECT_THAT(refusal(folder), HasSubstr("; it has pytorch_model.bin, but only safetensors is read"));
}

TEST(CheckpointIndex, MissingShard) {
  const TempFolder folder;
  write_tensors(folder / "1.safetensors", {"a"});
  write_index(folder, R"({"a":"1.safetensors","b":"2.safetensors"})");
  EXPECT_THAT(refusal(folder), AllOf(HasSubstr("shard 2.safetensors is missing"), HasSubstr("tensor b")));
}

TEST(CheckpointIndex, TensorInTwoShards) {
  const TempFolder folder;
  write_tensors(folder / "1.safetensors", {"a", "b"});
  write_tensors(folder / "2.safetensors", {"b", "c"});
  write_index(folder, R"({"a":"1.safetensors","b":"1.safetensors","c":"2.safetensors"})");
  EXPECT_THAT(refusal(folder), HasSubstr("tensor b: is in two shards, 1.safetensors and 2.safetensors"));
}

TEST(CheckpointIndex, TensorThatItsShardLacks) {
  const TempFolder folder;
  write_tensors(folder / "1.safetensors", {"a"});
  write_tensors(folder / "2.safetensors", {"b"});
  write_index(folder, R"({"a":"1.safetensors","b":"2.safetensors","c":"2.safetensors"})");
  EXPECT_THAT(refusal(folder),
              HasSubstr("/2.safetensors: tensor c is missing; model.safetensors.index.json puts it there"));
  write_index(folder, R"({"a":"2.safetensors","b":"1.safetensors"})");
  EXPECT_THAT(refusal(folder), HasSubstr("/2.safetensors: tensor a is missing"));
}

TEST(CheckpointIndex, DamagedShardIsNamed) {
  const TempFolder folder;
  write_tensors(folder / "1.safetensors", {"a"});
  write_file(folder / "2.safetensors", "short");
  write_file(folder / "3.safetensors", "");
  write_index(folder, R"({"a":"1.safetensors","b":"2.safetensors","c":"3.safetensors"})");
  for (int i = 0; i < 20; ++i) {  // the same one each time, though shards open in parallel
    EXPECT_THAT(refusal(folder), HasSubstr("/2.safetensors: file has 5 bytes"));
  }
}

TEST(CheckpointIndex, DamagedIndex) {
  const TempFolder folder;
  const std::pair<const char*, const char*> cases[] = {
      {"{", "index.json:1:2: not JSON"},
      {"[]", "no object weight_map"},
      {"{}", "no object weight_map"},
      {R"({"weight_map":[]})", "no object weight_map"},
      {R"({"weight_map":{}})", "weight_map is empty"},
      {R"({"weight_map":{"a":1}})", "tensor a: is number, expected the name of a file"},
      {R"({"weight_map":{"a":""}})", "tensor a: '', expected the name of a file in the same folder"},
      {R"({"weight_map":{"a":".."}})", "tensor a: '..', expected"},
      {R"({"weight_map":{"a":"../x.safetensors"}})", "tensor a: '../x.safetensors', expected"},
      {R"({"weight_map":{"a":"/etc/passwd"}})", "tensor a: '/etc/passwd', expected"},
      {R"({"weight_map":{"a":"x\u0000y"}})", R"(tensor a: 'x\x00y', expected)"},
  };
  for (const auto& [text, expected] : cases) {
    write_file(folder / "model.safetensors.index.json", text);
    EXPECT_THAT(refusal(folder), HasSubstr(expected)) << text;
  }
}

}  // namespace
}  // namespace rotunda::io
