#pragma once

#include <stdexcept>
#include <string>

namespace rotunda {

/// Whose fault an error is; decides the exit code of the program (2, 1, 3) and the wording.
enum class Fault {
  kUser,   ///< a flag, a shape, the content of a file: the caller can mend it
  kWorld,  ///< input/output, memory, the device
  kBug,    ///< a state that we hold to be impossible
};

/// The one exception of this project. `what()` is one line that says where, got and expected.
class Error : public std::runtime_error {
 public:
  Error(Fault fault, const std::string& message) : std::runtime_error(message), fault_(fault) {}
  Fault fault() const noexcept { return fault_; }

 private:
  Fault fault_;
};

/// Throws Error{Fault::kUser}.
[[noreturn]] void throw_user_error(const std::string& message);
/// Throws Error{Fault::kWorld}.
[[noreturn]] void throw_world_error(const std::string& message);
/// Throws Error{Fault::kBug} with the place and a stack trace in the log.
[[noreturn]] void throw_bug(const char* file, int line, const char* condition, const std::string& message);

}  // namespace rotunda
