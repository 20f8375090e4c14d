#include "io/safetensors.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "base/check.h"
#include "io/message.h"
#include "io/safetensors_header.h"

namespace rotunda::io {

namespace {

std::shared_ptr<void> map_file(const std::string& path, size_t& file_bytes) {
  // O_NONBLOCK: a pipe must be refused below, not waited for.
  const int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  ROTUNDA_CHECK_WORLD(fd >= 0, path, ": cannot open: ", std::strerror(errno));
  const std::shared_ptr<void> closer(nullptr, [fd](void*) { ::close(fd); });
  struct stat status;
  ROTUNDA_CHECK_WORLD(::fstat(fd, &status) == 0, path, ": cannot read its size: ", std::strerror(errno));
  ROTUNDA_CHECK(S_ISREG(status.st_mode), path, ": is not a regular file");
  file_bytes = static_cast<size_t>(status.st_size);
  if (file_bytes == 0) return nullptr;  // mmap refuses it; the parser says what is wrong with it
  void* address = ::mmap(nullptr, file_bytes, PROT_READ, MAP_PRIVATE, fd, 0);
  ROTUNDA_CHECK_WORLD(address != MAP_FAILED, path, ": cannot map ", file_bytes, " bytes: ", std::strerror(errno));
  return {address, [file_bytes](void* mapped) { ::munmap(mapped, file_bytes); }};
}

}  // namespace

std::shared_ptr<const SafetensorsFile> SafetensorsFile::open(const std::filesystem::path& path) {
  const std::string origin = path.string();
  size_t file_bytes = 0;
  const std::shared_ptr<SafetensorsFile> file(new SafetensorsFile());
  file->path_ = path;
  file->mapping_ = map_file(origin, file_bytes);
  SafetensorsHeader header = parse_safetensors({static_cast<const char*>(file->mapping_.get()), file_bytes}, origin);
  file->entries_ = std::move(header.entries);
  file->metadata_ = std::move(header.metadata);
  return file;
}

SafetensorsFile::~SafetensorsFile() = default;

at::Tensor SafetensorsFile::tensor(const std::string& name) const {
  const auto it = entries_.find(name);
  ROTUNDA_CHECK(it != entries_.end(), path_.string(), ": tensor ", printable(name), " is missing");
  const Entry& entry = it->second;
  const auto options = at::TensorOptions().dtype(entry.dtype);
  if (entry.begin_byte == entry.end_byte) return at::empty(entry.shape, options);

  auto* bytes = static_cast<uint8_t*>(mapping_.get()) + entry.begin_byte;
  if (entry.dtype == at::kBool) {
    // Any other byte in a bool is undefined behaviour for whoever reads it.
    const uint8_t* end = bytes + (entry.end_byte - entry.begin_byte);
    const uint8_t* odd = std::find_if(bytes, const_cast<uint8_t*>(end), [](uint8_t byte) { return byte > 1; });
    ROTUNDA_CHECK(odd == end, path_.string(), ": tensor ", printable(name), ": byte ", odd - bytes, " of BOOL is ",
                  int{*odd}, ", expected 0 or 1");
  }
  if (reinterpret_cast<uintptr_t>(bytes) % c10::elementSize(entry.dtype) != 0) {
    at::Tensor copy = at::empty(entry.shape, options);
    std::memcpy(copy.mutable_data_ptr(), bytes, static_cast<size_t>(entry.end_byte - entry.begin_byte));
    return copy;
  }
  return at::from_blob(
      bytes, entry.shape, [mapping = mapping_](void*) {}, options);
}

ops::TensorBundle read_bundle(const std::filesystem::path& path) {
  const auto file = SafetensorsFile::open(path);
  ops::TensorBundle bundle;
  bundle.origin = path.string();
  bundle.metadata = file->metadata();
  for (const auto& [name, entry] : file->entries()) bundle.tensors.emplace(name, file->tensor(name));
  return bundle;
}

}  // namespace rotunda::io
