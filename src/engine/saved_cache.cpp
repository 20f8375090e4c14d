#include "engine/saved_cache.h"

#include <ATen/ATen.h>

#include "base/check.h"
#include "engine/calibration.h"
#include "io/safetensors.h"

namespace rotunda::engine {

namespace {

constexpr const char* kKind = "kv_cache";
constexpr int64_t kVersion = 1;
constexpr const char* kPrefix = "cache/";
constexpr const char* kTokens = "tokens";

std::string calibration_of(const KvBinding& binding) {
  return binding.calibration ? fingerprint(*binding.calibration) : "none";
}

}  // namespace

void save_cache(const std::filesystem::path& path, const KvBinding& binding, const SavedCache& saved) {
  ops::TensorBundle file;
  file.add(kPrefix, saved.cache);
  file.tensors[kTokens] = at::tensor(saved.tokens, at::kLong);
  file.metadata["rotunda.kind"] = kKind;
  file.metadata["rotunda.version"] = std::to_string(kVersion);
  file.metadata["rotunda.weights_hash"] = binding.model->weights_hash();
  file.metadata["rotunda.kv"] = binding.used.to_string();
  file.metadata["rotunda.calibration"] = calibration_of(binding);
  io::write_bundle(path, file);
}

SavedCache load_cache(const std::filesystem::path& path, const KvBinding& binding) {
  const ops::TensorBundle file = io::read_bundle(path);
  ROTUNDA_CHECK(file.meta("rotunda.kind") == kKind, file.origin, ": holds a ", file.meta("rotunda.kind"), ", expected a ", kKind);
  ROTUNDA_CHECK(file.meta_int("rotunda.version") == kVersion, file.origin, ": saved cache version ",
                file.meta("rotunda.version"), ", expected ", kVersion);
  const std::string& hash = binding.model->weights_hash();
  ROTUNDA_CHECK(file.meta("rotunda.weights_hash") == hash, file.origin, ": made with other weights: hash ",
                file.meta("rotunda.weights_hash").substr(0, 12), "..., this model has ", hash.substr(0, 12), "...");
  ROTUNDA_CHECK(file.meta("rotunda.kv") == binding.used.to_string(), file.origin, ": holds a cache of ",
                file.meta("rotunda.kv"), ", --kv asks for ", binding.used.to_string());
  ROTUNDA_CHECK(file.meta("rotunda.calibration") == calibration_of(binding), file.origin, ": made with calibration ",
                file.meta("rotunda.calibration"), ", this run has ", calibration_of(binding));
  SavedCache saved;
  saved.cache = file.part(kPrefix);
  const at::Tensor tokens = file.get(kTokens, at::kLong, {-1}).contiguous();
  const int64_t* ids = tokens.const_data_ptr<int64_t>();
  saved.tokens.assign(ids, ids + tokens.numel());
  const int64_t vocab_size = binding.model->info().vocab_size;
  for (const int64_t id : saved.tokens) {
    ROTUNDA_CHECK(id >= 0 && id < vocab_size, file.origin, ": holds token ", id, ", the vocabulary has ", vocab_size);
  }
  return saved;
}

}  // namespace rotunda::engine
