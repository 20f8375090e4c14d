#include "base/env.h"

#include <algorithm>
#include <cstdlib>
#include <fstream>
#include <limits>
#include <string>

#include "base/error.h"

namespace rotunda::env {

namespace {

// cgroup v2: what the limit leaves; int64 max where there is no limit.
int64_t cgroup_headroom_bytes() {
  std::ifstream max_file("/sys/fs/cgroup/memory.max");
  std::ifstream current_file("/sys/fs/cgroup/memory.current");
  int64_t max_bytes = 0;
  int64_t current_bytes = 0;
  if (!(max_file >> max_bytes) || !(current_file >> current_bytes)) return std::numeric_limits<int64_t>::max();
  return std::max<int64_t>(0, max_bytes - current_bytes);
}

}  // namespace

std::optional<std::string> get(const char* name) {
  const char* value = std::getenv(name);
  if (value == nullptr || *value == '\0') return std::nullopt;
  return std::string(value);
}

std::filesystem::path user_cache_dir() {
  if (const auto dir = get("ROTUNDA_CACHE_DIR")) return *dir;
  if (const auto dir = get("XDG_CACHE_HOME")) return std::filesystem::path(*dir) / "rotunda";
  if (const auto home = get("HOME")) return std::filesystem::path(*home) / ".cache" / "rotunda";
  throw_world_error("no folder for cached files: set ROTUNDA_CACHE_DIR, XDG_CACHE_HOME or HOME");
}

int64_t available_memory_bytes() {
  std::ifstream meminfo("/proc/meminfo");
  std::string key;
  int64_t kibibytes = 0;
  std::string unit;
  while (meminfo >> key >> kibibytes) {
    std::getline(meminfo, unit);
    if (key == "MemAvailable:") return std::min(kibibytes * 1024, cgroup_headroom_bytes());
  }
  throw_world_error("/proc/meminfo: no line MemAvailable");
}

}  // namespace rotunda::env
