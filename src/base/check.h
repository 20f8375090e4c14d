#pragma once

#include <sstream>
#include <string>

#include "base/error.h"

namespace rotunda {

/// The arguments streamed one after the other: `concat("got ", 3)` is "got 3".
template <typename... Args>
std::string concat(const Args&... args) {
  std::ostringstream out;
  (out << ... << args);
  return out.str();
}

}  // namespace rotunda

/// The caller's fault: throws Error{kUser} with the message (where, got, expected) unless `condition` holds.
#define ROTUNDA_CHECK(condition, ...)                                \
  do {                                                               \
    if (!(condition)) [[unlikely]]                                   \
      ::rotunda::throw_user_error(::rotunda::concat(__VA_ARGS__));   \
  } while (false)

/// The world's fault (input/output, memory, device): throws Error{kWorld}.
#define ROTUNDA_CHECK_WORLD(condition, ...)                          \
  do {                                                               \
    if (!(condition)) [[unlikely]]                                   \
      ::rotunda::throw_world_error(::rotunda::concat(__VA_ARGS__));  \
  } while (false)

/// Our fault: throws Error{kBug}. On in release builds too.
#define ROTUNDA_ASSERT(condition, ...)                                                              \
  do {                                                                                              \
    if (!(condition)) [[unlikely]]                                                                  \
      ::rotunda::throw_bug(__FILE__, __LINE__, #condition, ::rotunda::concat("" __VA_OPT__(, ) __VA_ARGS__)); \
  } while (false)

/// ROTUNDA_ASSERT for hot loops: debug builds only.
#ifdef NDEBUG
#define ROTUNDA_DASSERT(condition, ...) \
  do {                                  \
  } while (false)
#else
#define ROTUNDA_DASSERT(condition, ...) ROTUNDA_ASSERT(condition __VA_OPT__(, ) __VA_ARGS__)
#endif
