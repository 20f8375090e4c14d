#include "base/error.h"

#include <execinfo.h>

#include <cstdlib>
#include <memory>

#include "base/log.h"

namespace rotunda {

void throw_user_error(const std::string& message) { throw Error(Fault::kUser, message); }

void throw_world_error(const std::string& message) { throw Error(Fault::kWorld, message); }

void throw_bug(const char* file, int line, const char* condition, const std::string& message) {
  void* frames[32];
  const int n = backtrace(frames, 32);
  const std::unique_ptr<char*, void (*)(void*)> symbols(backtrace_symbols(frames, n), std::free);
  for (int i = 1; symbols && i < n; ++i) ROTUNDA_LOG_ERROR("  {}", symbols.get()[i]);
  std::string text = std::string("bug: ") + file + ":" + std::to_string(line) + ": " + condition;
  if (!message.empty()) text += ": " + message;
  throw Error(Fault::kBug, text);
}

}  // namespace rotunda
