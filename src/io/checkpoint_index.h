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
  /// Opens every shard (in parallel). @throws Error{kUser} for a missing shard, a tensor that its shard lacks, a name in two shards.
  static CheckpointIndex open(const std::filesystem::path& model_dir);

  bool contains(const std::string& name) const { return shard_of_.count(name) != 0; }
  /// A view of the mapped bytes. @throws Error{kUser} naming the folder and the tensor where it is absent.
  at::Tensor tensor(const std::string& name) const;
  /// Dtype and shape without touching the bytes. @throws as tensor().
  const SafetensorsFile::Entry& entry(const std::string& name) const;
  std::vector<std::string> names() const;  ///< sorted
  int64_t total_bytes() const;
  /// SHA-256 (hex) over every tensor's name, dtype, shape and bytes in the order of names; shards hash in parallel chunks.
  std::string content_hash() const;
  const std::filesystem::path& model_dir() const { return model_dir_; }

 private:
  std::filesystem::path model_dir_;
  std::vector<std::shared_ptr<const SafetensorsFile>> shards_;
  std::map<std::string, size_t> shard_of_;
};

}  // namespace rotunda::io
