#pragma once

#include <fcntl.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <functional>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

namespace rotunda::cli {

struct Outcome {
  int exit_code = -1;  ///< 128 + signal where one ended it
  std::string out;
  std::string err;
};

/// A folder of its own, gone at the end.
class TemporaryFolder {
 public:
  TemporaryFolder() {
    std::string pattern = (std::filesystem::temp_directory_path() / "rotunda-app-XXXXXX").string();
    path_ = mkdtemp(pattern.data());
  }
  ~TemporaryFolder() { std::filesystem::remove_all(path_); }
  TemporaryFolder(const TemporaryFolder&) = delete;
  TemporaryFolder& operator=(const TemporaryFolder&) = delete;
  std::string operator/(const std::string& name) const { return (path_ / name).string(); }
  const std::filesystem::path& path() const { return path_; }

 private:
  std::filesystem::path path_;
};

inline std::string read_file(const std::string& path) {
  std::ostringstream text;
  text << std::ifstream(path, std::ios::binary).rdbuf();
  return text.str();
}

inline void write_file(const std::string& path, const std::string& content) { std::ofstream(path, std::ios::binary) << content; }

/// Runs the program that was built, in an empty environment but for the cache folder.
/// @param while_running  called once with the process id; may be empty
inline Outcome run_program(const std::vector<std::string>& arguments, const TemporaryFolder& folder,
                           const std::function<void(pid_t)>& while_running = {}) {
  const std::string out = folder / "stdout";
  const std::string err = folder / "stderr";
  const std::string cache_dir = "ROTUNDA_CACHE_DIR=" + folder / "cache";
  std::vector<char*> argv = {const_cast<char*>(ROTUNDA_PROGRAM)};
  for (const std::string& argument : arguments) argv.push_back(const_cast<char*>(argument.c_str()));
  argv.push_back(nullptr);
  const char* sanitizer = std::getenv("LSAN_OPTIONS");
  const std::string sanitizer_setting = std::string("LSAN_OPTIONS=") + (sanitizer == nullptr ? "" : sanitizer);
  char* environment[] = {const_cast<char*>(cache_dir.c_str()), const_cast<char*>(sanitizer_setting.c_str()), nullptr};
  const pid_t pid = fork();
  if (pid == 0) {
    dup2(open("/dev/null", O_RDONLY), STDIN_FILENO);
    dup2(open(out.c_str(), O_WRONLY | O_CREAT | O_TRUNC, 0644), STDOUT_FILENO);
    dup2(open(err.c_str(), O_WRONLY | O_CREAT | O_TRUNC, 0644), STDERR_FILENO);
    execve(ROTUNDA_PROGRAM, argv.data(), environment);
    _exit(127);
  }
  if (while_running) while_running(pid);
  int status = 0;
  waitpid(pid, &status, 0);
  return {.exit_code = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status), .out = read_file(out), .err = read_file(err)};
}

}  // namespace rotunda::cli
