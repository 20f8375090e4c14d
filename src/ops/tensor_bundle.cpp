#include "ops/tensor_bundle.h"

#include <charconv>

#include "base/check.h"

namespace rotunda::ops {

const at::Tensor& TensorBundle::get(const std::string& name, at::ScalarType dtype, at::IntArrayRef sizes) const {
  const auto it = tensors.find(name);
  ROTUNDA_CHECK(it != tensors.end(), origin, ": tensor ", name, " is missing");
  const at::Tensor& tensor = it->second;
  ROTUNDA_CHECK(tensor.scalar_type() == dtype, origin, ": tensor ", name, " is ", tensor.scalar_type(), ", expected ", dtype);
  bool fits = tensor.dim() == static_cast<int64_t>(sizes.size());
  for (size_t i = 0; fits && i < sizes.size(); ++i) fits = sizes[i] == -1 || tensor.size(static_cast<int64_t>(i)) == sizes[i];
  ROTUNDA_CHECK(fits, origin, ": tensor ", name, " has shape ", tensor.sizes(), ", expected ", sizes);
  return tensor;
}

const std::string& TensorBundle::meta(const std::string& key) const {
  const auto it = metadata.find(key);
  ROTUNDA_CHECK(it != metadata.end(), origin, ": metadata ", key, " is missing");
  return it->second;
}

int64_t TensorBundle::meta_int(const std::string& key) const {
  const std::string& text = meta(key);
  int64_t value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  ROTUNDA_CHECK(error == std::errc() && end == text.data() + text.size(), origin, ": metadata ", key, " is '", text,
                "', expected a whole number");
  return value;
}

void TensorBundle::add(const std::string& prefix, const TensorBundle& other) {
  for (const auto& [name, tensor] : other.tensors) tensors[prefix + name] = tensor;
  for (const auto& [key, value] : other.metadata) metadata[prefix + key] = value;
}

TensorBundle TensorBundle::part(const std::string& prefix) const {
  TensorBundle made;
  made.origin = origin;
  for (const auto& [name, tensor] : tensors)
    if (name.starts_with(prefix)) made.tensors[name.substr(prefix.size())] = tensor;
  for (const auto& [key, value] : metadata)
    if (key.starts_with(prefix)) made.metadata[key.substr(prefix.size())] = value;
  return made;
}

}  // namespace rotunda::ops
