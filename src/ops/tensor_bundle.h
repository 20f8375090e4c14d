#pragma once

#include <ATen/core/Tensor.h>

#include <map>
#include <string>

namespace rotunda::ops {

/// Named tensors with string metadata: what a saved cache or a calibration is between memory and a file. kv makes and reads
/// them, io writes and reads safetensors, engine brings the two together.
struct TensorBundle {
  std::map<std::string, at::Tensor> tensors;
  std::map<std::string, std::string> metadata;
  std::string origin = "memory";  ///< the file it came from, for error messages

  /// @throws Error{kUser} naming `origin`, the tensor, got and expected, unless it is there with this dtype and these sizes
  /// (-1: any size).
  const at::Tensor& get(const std::string& name, at::ScalarType dtype, at::IntArrayRef sizes) const;
  /// @throws Error{kUser} naming `origin` and the key, where it is absent.
  const std::string& meta(const std::string& key) const;
  /// The metadata value as a whole number. @throws Error{kUser} as `meta`, and where it is no number.
  int64_t meta_int(const std::string& key) const;

  /// Takes up all of another bundle, `prefix` in front of every name and key.
  void add(const std::string& prefix, const TensorBundle& other);
  /// What was taken up so, under its own names again; tensors are shared. Its origin is this one's.
  TensorBundle part(const std::string& prefix) const;
};

}  // namespace rotunda::ops
