#include "app/cli/output.h"

#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "base/check.h"

namespace rotunda::cli {

namespace {

// Writes all of it; false with errno set where that fails.
bool write_all(int fd, const std::string& text) {
  for (size_t done = 0; done < text.size();) {
    const ssize_t n = ::write(fd, text.data() + done, text.size() - done);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) return false;
    done += static_cast<size_t>(n);
  }
  return true;
}

std::filesystem::path folder_of(const std::filesystem::path& path) {
  return path.has_parent_path() ? path.parent_path() : std::filesystem::path(".");
}

}  // namespace

void write_stdout(const std::string& text) {
  ROTUNDA_CHECK_WORLD(write_all(STDOUT_FILENO, text), "standard output: cannot be written: ", std::strerror(errno));
}

void check_writable(const std::filesystem::path& path) {
  std::error_code ignored;
  ROTUNDA_CHECK_WORLD(!std::filesystem::is_directory(path, ignored), path.string(), ": is a folder, expected a file to write");
  const std::filesystem::path folder = folder_of(path);
  ROTUNDA_CHECK_WORLD(std::filesystem::is_directory(folder, ignored), path.string(), ": cannot be written: no folder ",
                      folder.string());
  ROTUNDA_CHECK_WORLD(::access(folder.c_str(), W_OK) == 0, path.string(), ": cannot be written: ", std::strerror(errno));
}

void write_file_atomically(const std::filesystem::path& path, const std::string& content) {
  std::string temporary = path.string() + ".tmp-XXXXXX";
  const int fd = ::mkstemp(temporary.data());
  ROTUNDA_CHECK_WORLD(fd >= 0, path.string(), ": cannot be written: ", std::strerror(errno));
  // mkstemp makes a file for the owner alone; results are ordinary files.
  bool good = ::fchmod(fd, 0644) == 0 && write_all(fd, content) && ::fsync(fd) == 0;
  good = ::close(fd) == 0 && good;
  good = good && ::rename(temporary.c_str(), path.c_str()) == 0;
  if (good) return;
  const std::string reason = std::strerror(errno);
  ::unlink(temporary.c_str());
  throw_world_error(concat(path.string(), ": cannot be written: ", reason));
}

}  // namespace rotunda::cli
