#pragma once

#include <filesystem>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "io/json_file.h"
#include "io/safetensors.h"

namespace rotunda::io {

/// The weights of a Hugging Face folder: `model.safetensors`, or the shards that `model.safetensors.index.json` lists.
class CheckpointIndex {
 public:
  /// Opens every shard (in parallel). Where both are there, the single file counts, as in transformers.
  /// @throws Error{kUser} for a missing shard, a tensor that its shard lacks, a name in two shards, a folder without
  /// weights; and as SafetensorsFile::open and read_json.
  static CheckpointIndex open(const std::filesystem::path& model_dir);

  bool contains(const std::string& name) const { return shard_of_.count(name) != 0; }
  /// A view of the mapped bytes. @throws Error{kUser} naming the folder and the tensor where it is absent.
  at::Tensor tensor(const std::string& name) const;
  /// Dtype and shape without touching the bytes. @throws as tensor().
  const SafetensorsFile::Entry& entry(const std::string& name) const;
  std::vector<std::string> names() const;  ///< sorted
  int64_t total_bytes() const;
  /// What the weights are, whatever files they are split into: SHA-256 (hex) over one record per tensor, in the order
  /// of names: name, dtype ("BF16"), number of dimensions, each size, SHA-256 of the tensor's bytes. Texts stand behind
  /// their length in bytes; lengths, dimensions and sizes are uint64 little-endian. Tensors hash in parallel.
  std::string content_hash() const;
  const std::filesystem::path& model_dir() const { return model_dir_; }

 private:
  std::filesystem::path model_dir_;
  std::vector<std::shared_ptr<const SafetensorsFile>> shards_;
  std::map<std::string, size_t> shard_of_;
};

}  // namespace rotunda::io
