#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "ops/tensor_bundle.h"

namespace rotunda::io {

/// One safetensors file, memory-mapped. Tensors are views of the mapping, which lives as long as any of them.
class SafetensorsFile {
 public:
  struct Entry {
    at::ScalarType dtype;
    std::vector<int64_t> shape;
    int64_t begin_byte;  ///< in the file
    int64_t end_byte;
  };

  /// Maps the file and checks its header whole: size, JSON, dtypes, shapes against offsets, no overlap, no gap, nothing
  /// beyond the end.
  /// @throws Error{kWorld} if it cannot be opened, Error{kUser} naming file, tensor, got and expected otherwise.
  static std::shared_ptr<const SafetensorsFile> open(const std::filesystem::path& path);

  const std::filesystem::path& path() const { return path_; }
  const std::map<std::string, Entry>& entries() const { return entries_; }
  const std::map<std::string, std::string>& metadata() const { return metadata_; }
  /// A view of the mapped bytes, in the dtype of the file; do not write to it (the pages are read-only). A tensor whose
  /// bytes are not aligned to its elements is copied, at every call. @throws Error{kUser} where it is absent, or a BOOL
  /// is not 0 or 1.
  at::Tensor tensor(const std::string& name) const;

  ~SafetensorsFile();

 private:
  SafetensorsFile() = default;
  std::filesystem::path path_;
  std::map<std::string, Entry> entries_;
  std::map<std::string, std::string> metadata_;
  std::shared_ptr<void> mapping_;
};

/// Reads the whole file into a bundle (tensors are views of the mapping; `origin` is the path).
ops::TensorBundle read_bundle(const std::filesystem::path& path);
/// Writes to a temporary file beside `path`, flushes, renames: a reader sees the old file or the new one, never half of
/// it. Equal bundles give equal bytes. Overwriting the file that a bundle is a view of is fine.
/// @throws Error{kWorld} with path and reason, Error{kUser} for a tensor that safetensors cannot hold; nothing is left
/// behind.
void write_bundle(const std::filesystem::path& path, const ops::TensorBundle& bundle);

}  // namespace rotunda::io
