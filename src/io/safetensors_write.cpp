#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <nlohmann/json.hpp>

#include "base/check.h"
#include "io/message.h"
#include "io/safetensors.h"
#include "io/safetensors_header.h"

namespace rotunda::io {

namespace {

// A file that is there under its name only once `commit` has returned.
class AtomicFile {
 public:
  explicit AtomicFile(const std::filesystem::path& path) : path_(path) {
    static std::atomic<int> counter{0};
    do {
      std::filesystem::path name = ".";
      name += path.filename();
      name += concat(".", ::getpid(), ".", counter++, ".tmp");
      temporary_ = path.parent_path() / name;
      fd_ = ::open(temporary_.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
    } while (fd_ < 0 && errno == EEXIST);  // left by a process that was killed
    if (fd_ < 0) fail();
  }

  AtomicFile(const AtomicFile&) = delete;
  AtomicFile& operator=(const AtomicFile&) = delete;

  ~AtomicFile() {
    if (fd_ >= 0) ::close(fd_);
    if (!committed_) ::unlink(temporary_.c_str());
  }

  void write(const void* data, size_t size_bytes) {
    const char* next = static_cast<const char*>(data);
    while (size_bytes > 0) {
      const ssize_t written = ::write(fd_, next, std::min<size_t>(size_bytes, size_t{1} << 30));
      if (written < 0 && errno == EINTR) continue;
      if (written < 0) fail();
      next += written;
      size_bytes -= static_cast<size_t>(written);
    }
  }

  void commit() {
    if (::fsync(fd_) != 0) fail();
    if (::close(std::exchange(fd_, -1)) != 0) fail();
    if (::rename(temporary_.c_str(), path_.c_str()) != 0) fail();
    committed_ = true;
    // Makes the new name last a power cut. Some file systems cannot flush a folder; the file itself is safe by then.
    const std::filesystem::path folder = path_.has_parent_path() ? path_.parent_path() : std::filesystem::path(".");
    const int folder_fd = ::open(folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (folder_fd < 0) return;
    (void)::fsync(folder_fd);
    ::close(folder_fd);
  }

 private:
  // A constructor that throws runs no destructor, but then there is no file either.
  [[noreturn]] void fail() const {
    throw_world_error(concat(path_.string(), ": cannot write: ", std::strerror(errno)));
  }

  std::filesystem::path path_;
  std::filesystem::path temporary_;
  int fd_ = -1;
  bool committed_ = false;
};

// Order of the dtypes in a file, widest first, so that every tensor is aligned to its elements; the order of the
// reference implementation, which makes equal content equal bytes.
int dtype_rank(at::ScalarType dtype) {
  static constexpr at::ScalarType kOrder[] = {at::kLong, at::kDouble, at::kFloat, at::kInt,  at::kBFloat16,
                                              at::kHalf, at::kShort,  at::kChar,  at::kByte, at::kBool};
  return static_cast<int>(std::find(std::begin(kOrder), std::end(kOrder), dtype) - std::begin(kOrder));
}

}  // namespace

void write_bundle(const std::filesystem::path& path, const ops::TensorBundle& bundle) {
  const std::string origin = path.string();
  ROTUNDA_CHECK(path.has_filename(), origin, ": cannot write: not the name of a file");
  std::vector<std::pair<std::string, at::Tensor>> order(bundle.tensors.begin(), bundle.tensors.end());
  for (const auto& [name, tensor] : order) {
    ROTUNDA_CHECK(name != "__metadata__", origin, ": cannot write a tensor of the name __metadata__");
    ROTUNDA_CHECK(tensor.defined(), origin, ": cannot write tensor ", printable(name), ": it is undefined");
    ROTUNDA_CHECK(!safetensors_dtype_name(tensor.scalar_type()).empty() && tensor.layout() == at::kStrided, origin,
                  ": cannot write tensor ", printable(name), ": safetensors has no ", tensor.layout(), " ",
                  tensor.scalar_type());
  }
  std::stable_sort(order.begin(), order.end(), [](const auto& a, const auto& b) {  // by name already
    return dtype_rank(a.second.scalar_type()) < dtype_rank(b.second.scalar_type());
  });

  nlohmann::ordered_json header = nlohmann::ordered_json::object();
  if (!bundle.metadata.empty()) header["__metadata__"] = bundle.metadata;
  int64_t offset = 0;
  for (const auto& [name, tensor] : order) {
    const int64_t end = offset + static_cast<int64_t>(tensor.nbytes());
    header[name] = {{"dtype", safetensors_dtype_name(tensor.scalar_type())},
                    {"shape", tensor.sizes().vec()},
                    {"data_offsets", {offset, end}}};
    offset = end;
  }
  std::string text;
  try {
    text = header.dump();
  } catch (const nlohmann::json::type_error&) {
    throw_user_error(concat(origin, ": cannot write: a name or a metadata value is not UTF-8"));
  }
  text.resize((text.size() + 7) / 8 * 8, ' ');
  ROTUNDA_CHECK(static_cast<int64_t>(text.size()) <= kMaxSafetensorsHeaderBytes, origin, ": cannot write: header of ",
                text.size(), " bytes, at most ", kMaxSafetensorsHeaderBytes);

  AtomicFile file(path);
  char prefix[kSafetensorsPrefixBytes];
  for (int i = 0; i < kSafetensorsPrefixBytes; ++i)
    prefix[i] = static_cast<char>(uint64_t{text.size()} >> 8 * i & 0xff);
  file.write(prefix, sizeof(prefix));
  file.write(text.data(), text.size());
  for (const auto& [name, tensor] : order) {
    if (tensor.numel() == 0) continue;
    const at::Tensor bytes = tensor.cpu().resolve_neg().contiguous();  // one copy at a time
    file.write(bytes.const_data_ptr(), bytes.nbytes());
  }
  file.commit();
}

}  // namespace rotunda::io
