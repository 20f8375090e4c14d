#include "io/checkpoint_index.h"

#include <algorithm>
#include <atomic>
#include <exception>
#include <functional>
#include <nlohmann/json.hpp>
#include <thread>

#include "base/check.h"
#include "io/message.h"
#include "io/safetensors_header.h"
#include "io/sha256.h"

namespace rotunda::io {

namespace fs = std::filesystem;

namespace {

constexpr char kSingleFile[] = "model.safetensors";
constexpr char kIndexFile[] = "model.safetensors.index.json";

// Runs task(0) ... task(n - 1) on the machine's threads, lowest first. Rethrows the error of the lowest task that
// failed, so that a folder with two faults always reports the same one.
void run_parallel(size_t n, const std::function<void(size_t)>& task) {
  std::vector<std::exception_ptr> errors(n);
  std::atomic<size_t> next{0};
  const auto work = [&] {
    for (size_t i = next++; i < n; i = next++) {
      try {
        task(i);
      } catch (...) {
        errors[i] = std::current_exception();
      }
    }
  };
  std::vector<std::thread> threads;
  const size_t n_threads = std::min<size_t>(n, std::max(1u, std::thread::hardware_concurrency()));
  try {
    for (size_t i = 1; i < n_threads; ++i) threads.emplace_back(work);
  } catch (const std::system_error&) {
    // No more threads to be had: those that run do the work.
  }
  work();
  for (std::thread& thread : threads) thread.join();
  for (const std::exception_ptr& error : errors) {
    if (error) std::rethrow_exception(error);
  }
}

// tensor -> shard, as the index file says.
std::map<std::string, std::string> read_weight_map(const fs::path& path) {
  const nlohmann::json index = read_json(path);
  ROTUNDA_CHECK(index.is_object() && index.contains("weight_map") && index["weight_map"].is_object(), path.string(),
                ": no object weight_map");
  std::map<std::string, std::string> shard_of;
  for (const auto& [name, shard] : index["weight_map"].items()) {
    ROTUNDA_CHECK(shard.is_string(), path.string(), ": weight_map: tensor ", printable(name), ": is ",
                  shard.type_name(), ", expected the name of a file");
    const std::string file = shard.get<std::string>();
    // A path would let an index read outside of its folder.
    ROTUNDA_CHECK(!file.empty() && file.find('/') == std::string::npos && file.find('\0') == std::string::npos &&
                      file != "." && file != "..",
                  path.string(), ": weight_map: tensor ", printable(name), ": '", printable(file),
                  "', expected the name of a file in the same folder");
    shard_of.emplace(name, file);
  }
  ROTUNDA_CHECK(!shard_of.empty(), path.string(), ": weight_map is empty");
  return shard_of;
}

std::string nothing_found(const fs::path& dir) {
  std::string text = concat(dir.string(), ": has neither ", kSingleFile, " nor ", kIndexFile);
  for (const char* other : {"pytorch_model.bin", "pytorch_model.bin.index.json"}) {
    if (fs::exists(dir / other)) return text + concat("; it has ", other, ", but only safetensors is read");
  }
  return text;
}

void update_uint64(Sha256& hash, uint64_t value) {
  uint8_t bytes[8];
  for (int i = 0; i < 8; ++i) bytes[i] = static_cast<uint8_t>(value >> 8 * i);
  hash.update(bytes, sizeof(bytes));
}

void update_text(Sha256& hash, std::string_view text) {
  update_uint64(hash, text.size());
  hash.update(text.data(), text.size());
}

}  // namespace

CheckpointIndex CheckpointIndex::open(const fs::path& model_dir) {
  std::error_code error;
  const auto status = fs::status(model_dir, error);
  ROTUNDA_CHECK(fs::exists(status), model_dir.string(), ": no such folder");
  ROTUNDA_CHECK(fs::is_directory(status), model_dir.string(), ": is not a folder; expected one with ", kSingleFile);

  CheckpointIndex index;
  index.model_dir_ = model_dir;
  std::map<std::string, std::string> weight_map;
  std::vector<std::string> files;
  if (fs::exists(model_dir / kSingleFile)) {
    files.emplace_back(kSingleFile);
  } else {
    ROTUNDA_CHECK(fs::exists(model_dir / kIndexFile), nothing_found(model_dir));
    weight_map = read_weight_map(model_dir / kIndexFile);
    for (const auto& [name, file] : weight_map) files.push_back(file);
    std::sort(files.begin(), files.end());
    files.erase(std::unique(files.begin(), files.end()), files.end());
    for (const std::string& file : files) {
      const auto user =
          std::find_if(weight_map.begin(), weight_map.end(), [&](const auto& item) { return item.second == file; });
      ROTUNDA_CHECK(fs::exists(model_dir / file), model_dir.string(), ": shard ", printable(file), " is missing; ",
                    kIndexFile, " puts tensor ", printable(user->first), " there");
    }
  }

  index.shards_.resize(files.size());
  run_parallel(files.size(), [&](size_t i) { index.shards_[i] = SafetensorsFile::open(model_dir / files[i]); });

  for (size_t i = 0; i < files.size(); ++i) {
    for (const auto& [name, entry] : index.shards_[i]->entries()) {
      const auto [it, fresh] = index.shard_of_.emplace(name, i);
      ROTUNDA_CHECK(fresh, model_dir.string(), ": tensor ", printable(name), ": is in two shards, ",
                    printable(files[it->second]), " and ", printable(files[i]));
    }
  }
  for (const auto& [name, file] : weight_map) {
    const auto it = index.shard_of_.find(name);
    ROTUNDA_CHECK(it != index.shard_of_.end() && files[it->second] == file, (model_dir / file).string(), ": tensor ",
                  printable(name), " is missing; ", kIndexFile, " puts it there");
  }
  return index;
}

const SafetensorsFile::Entry& CheckpointIndex::entry(const std::string& name) const {
  const auto it = shard_of_.find(name);
  ROTUNDA_CHECK(it != shard_of_.end(), model_dir_.string(), ": tensor ", printable(name), " is missing");
  return shards_[it->second]->entries().at(name);
}

at::Tensor CheckpointIndex::tensor(const std::string& name) const {
  entry(name);  // for its error, which names the folder
  return shards_[shard_of_.at(name)]->tensor(name);
}

std::vector<std::string> CheckpointIndex::names() const {
  std::vector<std::string> names;
  names.reserve(shard_of_.size());
  for (const auto& [name, shard] : shard_of_) names.push_back(name);
  return names;
}

int64_t CheckpointIndex::total_bytes() const {
  int64_t bytes = 0;
  for (const auto& shard : shards_) {
    for (const auto& [name, entry] : shard->entries()) bytes += entry.end_byte - entry.begin_byte;
  }
  return bytes;
}

std::string CheckpointIndex::content_hash() const {
  const std::vector<std::string> names = this->names();
  const auto bytes_of = [&](size_t i) { return entry(names[i]).end_byte - entry(names[i]).begin_byte; };
  // The largest first: an embedding that comes last would leave the other threads idle.
  std::vector<size_t> order(names.size());
  for (size_t i = 0; i < order.size(); ++i) order[i] = i;
  std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return bytes_of(a) > bytes_of(b); });

  std::vector<Sha256Digest> digests(names.size());
  run_parallel(names.size(), [&](size_t i) {
    const at::Tensor bytes = tensor(names[order[i]]);
    Sha256 hash;
    if (bytes.numel() != 0) hash.update(bytes.const_data_ptr(), bytes.nbytes());
    digests[order[i]] = hash.finish();
  });

  Sha256 hash;
  for (size_t i = 0; i < names.size(); ++i) {
    const SafetensorsFile::Entry& tensor = entry(names[i]);
    update_text(hash, names[i]);
    update_text(hash, safetensors_dtype_name(tensor.dtype));
    update_uint64(hash, tensor.shape.size());
    for (const int64_t size : tensor.shape) update_uint64(hash, static_cast<uint64_t>(size));
    hash.update(digests[i].data(), digests[i].size());
  }
  return to_hex(hash.finish());
}

}  // namespace rotunda::io
